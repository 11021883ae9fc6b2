"""Rows of a batch that repeat a prompt (``num_return_sequences``, beams, several answers in RL): computed once.

``generate`` repeats the inputs before the prompt is computed. What stands before its prefill here looks for rows that
are alike, wherever they are, computes one of each, and lets the others begin with what the cache then holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_attn_patch.compat.calls import cache_of
from hf_attn_patch.compat.transformers import attention_name

from .beginnings import can_begin, held_in, rows_of

#: the attention implementation that takes keys and values in parts
OURS = __package__.partition(".")[0]
#: what a prefill returns with a row for each row of the batch
_ROWS = ("logits", "hidden_states", "attentions")


def prefill_once(inner: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """``inner`` (the prefill of ``model``'s generate) on one of each of the rows that are alike.

    It is called as it is where rows cannot be told apart by what is seen here: other inputs than tokens, embeddings and
    their masks and positions, models that keep something of each row besides the cache, caches of other kinds.
    """
    names = ("input_ids", "generation_config", "model_kwargs", "is_first_iteration")
    given = dict(zip(names, args, strict=False)) | kwargs
    ids, model_kwargs = given["input_ids"], given["model_kwargs"]
    cache = cache_of(model_kwargs)
    inputs = None if cache is None else _inputs_by_row(model, ids, model_kwargs, cache)
    if inputs is None or getattr(given["generation_config"], "is_assistant", False):
        return inner(*args, **kwargs)
    held = rows_of(cache.layers)
    of = _repeats([ids, *inputs.values()])
    first = [of.index(row) for row in range(max(of) + 1)]
    if held not in (0, len(first)):
        if held == 1:  # a prefix that all prompts begin with
            cache.begin_rows([0] * len(first))
        elif held == len(of) and _begin_alike(cache.layers, of):
            cache.begin_rows(first)
        else:
            return inner(*args, **kwargs)
    if len(first) == len(of):
        return inner(*args, **kwargs)
    where = torch.tensor(first, device=ids.device)
    fewer = {name: value.index_select(0, where.to(value.device)) for name, value in inputs.items()}
    given |= {"input_ids": ids.index_select(0, where), "model_kwargs": {**model_kwargs, **fewer}}
    with _no_more_than_prompts(cache, ids.shape[1]):
        output = inner(**given)
    share = attention_name(model.config.get_text_config(decoder=True)) == OURS and 2 * len(first) <= len(of)
    cache.begin_rows(of, share)
    _give_each_row(output, of, (len(first), ids.shape[1]))
    return output


def _inputs_by_row(model: Any, ids: Tensor, model_kwargs: dict[str, Any], cache: Any) -> dict[str, Tensor] | None:
    """The tensors [B, S] or [B, S, E] that come with the ids; None if rows may differ in what is not in them."""
    if not hasattr(cache, "begin_rows") or cache.offloading or not can_begin(cache.layers):
        return None
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        return None
    if model.config.is_encoder_decoder or ids.dim() != 2 or ids.shape[0] < 2 or torch.is_grad_enabled():
        return None
    if any(hasattr(module, "rope_deltas") for module in model.modules()):  # kept with the model, a row for each prompt
        return None
    if model_kwargs.get("output_router_logits") or getattr(model.config, "output_router_logits", False):
        return None
    found = {}
    for name, value in model_kwargs.items():
        if isinstance(value, Tensor):
            embeddings = name == "inputs_embeds" and value.dim() == 3
            if not (embeddings or value.dim() == 2) or value.shape[0] != ids.shape[0]:
                return None
            found[name] = value
        elif not (value is cache or value is None or isinstance(value, (bool, int, float, str))):
            return None
    return found


def _repeats(inputs: list[Tensor]) -> list[int]:
    """For each row, how many kinds of rows there were before the first one of its own: equal numbers are rows that are
    alike.

    Read from the device once, and once more where some rows seem alike.
    """
    device = inputs[0].device
    sums = torch.stack([_checksum(value).to(device) for value in inputs], 1).tolist()
    seen: dict[tuple[int, ...], int] = {}
    first = [seen.setdefault(tuple(sums[row]), row) for row in range(len(sums))]
    if len(seen) < len(first):
        differ = torch.zeros(len(first), dtype=torch.bool, device=device)
        for value in inputs:
            where = torch.tensor(first, device=value.device)
            differ |= (value != value.index_select(0, where)).flatten(1).any(1).to(device)
        first = [row if wrong else like for row, (like, wrong) in enumerate(zip(first, differ.tolist(), strict=True))]
    kinds = sorted(set(first))
    return [kinds.index(like) for like in first]


def _checksum(value: Tensor) -> Tensor:
    """Int64 [B] that is equal for equal rows of [B, S] or [B, S, E] (of which one number of each E is looked at)."""
    numbers = value if value.dim() == 2 else value[..., 0]
    if numbers.is_floating_point():
        numbers = numbers.float().contiguous().view(torch.int32)
    factors = torch.arange(1, numbers.shape[1] + 1, device=value.device) * 0x9E3779B97F4A7C1
    return (numbers.long() * (factors ^ (factors >> 29))).sum(1)


def _begin_alike(layers: Any, of: list[int]) -> bool:
    """Whether rows that are alike in ``of`` also are in the cache: they begin with the same, and have nothing else."""
    for layer in held_in(layers):
        shared = getattr(layer, "shared", ())
        if (layer.own if shared else layer).get_seq_length():
            return False
        for part in shared:
            if len({*zip(of, part.rows.of, strict=True)}) != max(of) + 1:
                return False
    return True


class _no_more_than_prompts:  # noqa: N801 - a block
    """Within, growing layers make room for a prompt and no more: what follows is written elsewhere."""

    def __init__(self, cache: Any, length: int) -> None:
        self.cache, self.length = cache, length

    def __enter__(self) -> None:
        self.expected = [getattr(layer, "expected_length", None) for layer in self.cache.layers]
        for layer in self.cache.layers:
            if hasattr(layer, "expected_length"):
                layer.expected_length = self.length

    def __exit__(self, *error: object) -> None:
        for layer, expected in zip(self.cache.layers, self.expected, strict=False):
            if hasattr(layer, "expected_length"):
                layer.expected_length = expected


def _give_each_row(output: Any, of: list[int], computed: tuple[int, int]) -> None:
    """Repeat what a prefill of ``computed`` rows and tokens returned, for all rows of the batch; in place."""
    for name in _ROWS:
        if isinstance(output, ModelOutput) and output.get(name) is not None:
            output[name] = _repeated(output[name], of, computed if name == "hidden_states" else None)


def _repeated(value: Any, of: list[int], streams_of: tuple[int, int] | None) -> Any:
    """
    Args:
        streams_of: the rows and tokens of hidden states, which come as [B, S, E] or (Gemma 3n) as [N, B, S, E].
    """
    if isinstance(value, Tensor):
        streams = value.dim() == 4 and tuple(value.shape[1:3]) == streams_of
        return value.index_select(int(streams), torch.tensor(of, device=value.device))
    if isinstance(value, (tuple, list)):
        return type(value)(_repeated(one, of, streams_of) for one in value)
    return value
