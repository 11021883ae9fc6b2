"""What a decoder beside an encoder says of what the encoder read, drawn token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.compat.cache_keyword import keyword_of
from hf_attn_patch.compat.calls import cache_of
from hf_attn_patch.conversion.processes import current
from hf_attn_patch.documents.bars import progress_bar

#: sequences that are written at a time: on a CPU, and at most on a GPU
ROWS, MOST_ROWS = 32, 4096


@torch.no_grad()
def written(
    model: Any, memory: Tensor, prefix: Tensor, length: int, *, end: int, seed: int, forbidden: Tensor | None = None
) -> list[list[int]]:
    """Let a sequence-to-sequence model write, at temperature 1: of several processes each its share of the sequences.

    Args:
        memory: its encoder's output [N, S', E], on any device.
        prefix: what each sequence begins with [N, P].
        length: tokens at most, ``prefix`` among them.
        end: the token that ends a sequence.
        forbidden: ids that are not written.

    Returns:
        N sequences, each with its prefix and, where it came to one, its end.
    """
    processes = current()
    draw, mine = torch.Generator(model.device).manual_seed(processes.seed(seed)), processes.share(len(memory))
    memory, prefix = memory[mine], prefix[mine]
    out: list[list[int]] = []
    at_once = rows_at_once(model, memory.shape[1], length)
    parts = list(zip(memory.split(at_once), prefix.split(at_once), strict=True)) if len(memory) else []
    for some, begin in progress_bar(parts, desc="answering", unit="batch", leave=False):
        rows = _write(model, some.to(model.device, model.dtype), begin.to(model.device), length, end, draw, forbidden)
        for row in rows.tolist():
            after = row[prefix.shape[1] :]
            out.append(row[: prefix.shape[1] + after.index(end) + 1] if end in after else row)
    return [row for part in processes.everybody(out) for row in part]


def rows_at_once(model: Any, heard: int, length: int) -> int:
    """How many sequences are written at a time: as many as a GPU has room for.

    Args:
        heard: S', of the encoder's output; ``length``: of what is written.
    """
    if model.device.type != "cuda":
        return ROWS
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None)
    width = int(config.hidden_size)
    # keys and values of both attentions, which may be twice as wide as the model; the logits and what is made of them
    cache = 2 * 2 * int(layers or config.num_hidden_layers) * (heard + length) * width * model.dtype.itemsize
    row = cache + heard * width * model.dtype.itemsize + 5 * 4 * int(config.vocab_size)
    return int(max(1, min(MOST_ROWS, 0.4 * torch.cuda.mem_get_info(model.device)[0] // row)))


def _write(
    model: Any, memory: Tensor, prefix: Tensor, length: int, end: int, draw: torch.Generator, forbidden: Tensor | None
) -> Tensor:
    """[B, length] at most; what follows an end means nothing."""
    from transformers.modeling_outputs import BaseModelOutput

    ids, new = prefix, prefix
    known: dict[str, Any] = {}
    over = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    while ids.shape[1] < length and not bool(over.all()):
        said = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory), decoder_input_ids=new, use_cache=True, **known
        )  # fmt: skip
        known = {keyword_of(type(model).forward): cache_of(said)}
        logits = said.logits[:, -1].float()
        if forbidden is not None:
            logits[:, forbidden.to(logits.device)] = -torch.inf
        chances = torch.softmax(logits, -1)
        # the largest of p / e with e exponential is a draw from p
        new = chances.div_(torch.empty_like(chances).exponential_(generator=draw)).argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], 1)
        over |= new[:, 0] == end
    return ids
