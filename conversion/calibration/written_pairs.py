"""What a decoder beside an encoder says of what the encoder read, drawn token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.compat.cache_keyword import keyword_of
from hf_attn_patch.compat.calls import cache_of

#: sequences that are written at a time
ROWS = 32


@torch.no_grad()
def written(
    model: Any, memory: Tensor, prefix: Tensor, length: int, *, end: int, seed: int, forbidden: Tensor | None = None
) -> list[list[int]]:
    """Let a sequence-to-sequence model write, at temperature 1.

    Args:
        memory: its encoder's output [N, S', E], on any device.
        prefix: what each sequence begins with [N, P].
        length: tokens at most, ``prefix`` among them.
        end: the token that ends a sequence.
        forbidden: ids that are not written.

    Returns:
        N sequences, each with its prefix and, where it came to one, its end.
    """
    draw = torch.Generator(model.device).manual_seed(seed)
    out: list[list[int]] = []
    for some, begin in zip(memory.split(ROWS), prefix.split(ROWS), strict=True):
        rows = _write(model, some.to(model.device, model.dtype), begin.to(model.device), length, end, draw, forbidden)
        for row in rows.tolist():
            after = row[prefix.shape[1] :]
            out.append(row[: prefix.shape[1] + after.index(end) + 1] if end in after else row)
    return out


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
