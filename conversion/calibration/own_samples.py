"""Calibration text that a language model writes itself, for conversions to which no text is given.

Every sequence begins with a token drawn from all that the model has, and goes on as the model says, at temperature 1:
cooler, hotter and truncated sampling and chat templates were measured and are worse (docs/results.md). Documents that
end are followed by others, as in training.

Shapes: N sequences, S tokens of each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.errors import ConversionError, one_line

#: sequences that are written at a time
MOST_ROWS = 1024


@torch.no_grad()
def own_samples(model: Any, tokens: int, length: int, *, seed: int, row_bytes: int) -> Tensor:
    """Let a causal language model write text.

    Args:
        model: on the device where it runs, in evaluation mode.
        tokens: how many in all; at least one sequence is written.
        length: S, of each sequence.
        seed: draws the first tokens and all that follow.
        row_bytes: what the KV cache of one sequence takes.

    Returns:
        ids [N, S] int64, on the CPU.

    Raises:
        ConversionError: the model's logits are not finite, or it cannot decode token by token.
    """
    device = model.device
    rows = max(1, tokens // length)
    draw = torch.Generator(device).manual_seed(seed)
    at_once = min(rows, MOST_ROWS, _that_fit(device, row_bytes, _words(model)))
    with _decoding(model), progress_bar(total=rows * length, desc="sampling", unit="tok", unit_scale=True) as bar:
        written = [_write(model, min(at_once, rows - n), length, draw, bar.update) for n in range(0, rows, at_once)]
    return torch.cat(written).cpu()


def _write(model: Any, rows: int, length: int, draw: torch.Generator, written: Callable[[int], object]) -> Tensor:
    """Sequences [rows, length]; ``written`` is told of every step's tokens."""
    from hf_attn_patch import GrowingCache
    from hf_attn_patch.compat.cache_keyword import keyword_of

    # as large as it will get, at once: the recorded step then keeps its memory
    cache = GrowingCache(config=model.config, growth=float(length), expected_length=length)
    given = {keyword_of(type(model).forward): cache, "use_cache": True}
    out = torch.empty(rows, length, dtype=torch.int64, device=model.device)
    out[:, 0] = torch.randint(0, _words(model), (rows,), device=model.device, generator=draw)
    written(rows)
    for step in range(1, length):
        try:
            said = model(input_ids=out[:, step - 1 : step], **given).logits[:, -1]
        except Exception as error:  # a model's own code, on a cache that it may not know
            text = one_line(error)
            raise ConversionError(
                f"{type(model).__name__} cannot write its own calibration text ({type(error).__name__}: {text}); give"
                " --calibrate TEXT"
            ) from None
        chances = torch.softmax(said.float(), -1)
        # the largest of p / e with e exponential is a draw from p; nothing waits for the device
        out[:, step] = chances.div_(torch.empty_like(chances).exponential_(generator=draw)).argmax(-1)
        written(rows)
        if step == 1 and not bool(said.isfinite().all()):
            raise ConversionError("the model's logits are not finite: it cannot write its own calibration text")
    return out


def _words(model: Any) -> int:
    return int(model.get_input_embeddings().num_embeddings)


def _that_fit(device: torch.device, row_bytes: int, words: int) -> int:
    """How many sequences a GPU has room for, with the numbers that sampling makes of each."""
    if device.type != "cuda":
        return MOST_ROWS
    free = torch.cuda.mem_get_info(device)[0]
    return max(1, int(0.7 * free) // (row_bytes + 5 * 4 * words))


@contextlib.contextmanager
def _decoding(model: Any) -> Iterator[None]:
    """Our attention, and on a GPU recorded steps, where the model takes them; as it was afterwards."""
    import hf_attn_patch
    from hf_attn_patch.compat.transformers import attention_name

    before = attention_name(model.config)
    try:
        hf_attn_patch.enable(model, cuda_graphs=True if model.device.type == "cuda" else None)
    except hf_attn_patch.AttentionError:  # attention of its own: slower, and the same text
        yield
        return
    try:
        yield
    finally:
        hf_attn_patch.enable(model, cuda_graphs=False)
        if before is not None:
            model.set_attn_implementation(before)
