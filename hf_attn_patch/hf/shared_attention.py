"""One layer's call on keys that its rows share in part, or that are codes: as they are where that can be said, else
None."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_attn_patch.attn import memo
from hf_attn_patch.attn.choice import asked_for
from hf_attn_patch.attn.request import Operands
from hf_attn_patch.attn.shared_attend import MOST_QUERIES, attend_codes, attend_shared, has_kernel
from hf_attn_patch.attn.visibility import FULL, NO_WINDOW, PACKED, Visibility, remembered_full
from hf_attn_patch.compat.later import LaterTensor, whole
from hf_attn_patch.compat.torch import any_autocast

from .call_visibility import causality, visibility_of
from .mask_pattern import Pattern, of_carrier

_NO_BORDERS = None, None, None, None


class Asked(NamedTuple):
    """What a layer asks for besides its tensors.

    Args:
        name: the backend to insist on.
        is_causal: where no mask says more; None: as the module says.
        scores: scaling, softcap, sinks and bias.
        more: what is computed on whole keys alone (attention weights, dropout).
    """

    name: str | None
    is_causal: bool | None
    sliding_window: int | None
    scores: tuple[float | None, float | None, Tensor | None, Tensor | None]
    position_ids: Tensor | None
    more: bool


def over_parts(
    module: torch.nn.Module, query: Tensor, key: LaterTensor, value: Tensor, mask: Tensor | None, asked: Asked
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Attention over what ``key`` and ``value`` consist of: parts that rows share, codes.

    Returns:
        [B, Sq, HQ, Dv], or None where the call wants something that is done on whole keys of numbers alone; the keys
        and values, which are that in that case.
    """
    out = _over_parts(module, query, key, value, mask, asked)
    return (None, whole(key), whole(value)) if out is None else (out, key, value)


def _over_parts(
    module: torch.nn.Module, query: Tensor, key: LaterTensor, value: Tensor, mask: Tensor | None, asked: Asked
) -> Tensor | None:
    scaling, softcap, sinks, bias = asked.scores
    if type(value) is not LaterTensor or value.form is not key.form or type(query) is not Tensor or asked.more:
        return None
    if query.shape[2] > MOST_QUERIES or query.dtype != key.dtype or any_autocast():
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, sinks, bias)):
        return None
    memo.asks(module, False)
    pattern = None if mask is None or mask.dtype is not torch.int32 else of_carrier(mask)
    name = asked.name or asked_for()
    if not key.form.shared:
        return _over_codes(module, query, key, mask, pattern, asked, name)
    if name is not None or bias is not None:
        return None
    visible, bias = _visible(module, query, key, mask, pattern, asked)
    if bias is not None or not visible.facts.whole:
        return None
    plain = visible.kind == FULL and visible.facts.window == NO_WINDOW
    dense = None if plain else visible.dense(query.device)
    if dense is not None and dense.shape[-1] != key.shape[2]:
        return None
    seen: Any = {"causal": visible.facts.causal, "mask": dense}
    seen["all_shared"] = query.shape[2] == 1 and _sees_what_is_shared(pattern)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.no_grad():
        out = attend_shared(query, key.form, scale=scale, softcap=softcap, sinks=sinks, **seen)
    return out.transpose(1, 2).contiguous()


def _over_codes(
    module: torch.nn.Module,
    query: Tensor,
    key: LaterTensor,
    mask: Tensor | None,
    pattern: Pattern | None,
    asked: Asked,
    name: str | None,
) -> Tensor | None:
    """Where no rows share anything: the decode kernel on all kinds of calls that it takes."""
    form, (scaling, softcap, sinks, _) = key.form, asked.scores
    if name not in (None, "triton_decode") or not has_kernel(query.device, query.dtype, *form.widths):
        return None
    visible, bias = _visible(module, query, key, mask, pattern, asked)
    if visible.kind == PACKED or (visible.window != NO_WINDOW and not visible.causal):
        return None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.no_grad():
        out = attend_codes(query, form, Operands(visible, scale, softcap, sinks, bias))
    return out.transpose(1, 2).contiguous()


def _visible(
    module: torch.nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, pattern: Pattern | None, asked: Asked
) -> tuple[Visibility, Tensor | None]:
    """Who sees whom, and what is added to the scores."""
    Sq, Sk = query.shape[2], key.shape[2]
    one_document = Sq == 1 or asked.position_ids is None
    if pattern is not None and pattern.causal and pattern.is_plain() and pattern.kv_len == Sk and one_document:
        seen: Visibility = remembered_full(Sq, Sk, True, NO_WINDOW, query.shape[0])  # on a GPU it would be a mask
        return seen, asked.scores[3]
    causal, window = causality(module, asked.is_causal, asked.sliding_window)
    bias = asked.scores[3]
    return visibility_of(query, key, mask, bias, asked.position_ids, _NO_BORDERS, causal, window, tracing=False)


def _sees_what_is_shared(pattern: Pattern | None) -> bool:
    """Whether one token sees all that lies before its row's own keys: whatever its position is, which a recorded step
    has on the device alone."""
    if pattern is None or not pattern.causal or pattern.window != NO_WINDOW:
        return False
    return pattern.keys is None and pattern.chunk is None and pattern.documents is None
