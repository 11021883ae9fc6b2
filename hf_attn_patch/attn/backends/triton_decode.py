"""Our own Triton kernel for 1 to 16 queries, and for trees of up to 64 with a mask of their own.

The group's queries are one tile, so that K and V are read once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_patch.attn.codes import as_codes
from hf_attn_patch.attn.devices import HAS_TRITON, Device, interpreted, lacks, needs_nvidia
from hf_attn_patch.attn.kernels.decode_operands import DecodeOperands, why_not
from hf_attn_patch.attn.request import AttentionRequest, Operands, new_tuple
from hf_attn_patch.attn.shared import Parted
from hf_attn_patch.attn.visibility import PACKED, Dense, Full, Padded, Visibility
from hf_attn_patch.compat.torch import operators_are_watched

from ._common import cut, cut_bias


def missing() -> str | None:
    """Why Triton cannot run here, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    return None if interpreted() else lacks(70)


def refuses(request: AttentionRequest) -> str | None:
    """Why not, or None."""
    if not interpreted() and (reason := needs_nvidia(request, 70)):
        return reason
    if request.q_class > 16 and not request.tree:
        return "takes at most 16 queries, or 64 with a mask over 8 times as many keys"
    if request.grad:
        return "has no backward"
    if request.dropout:
        return "has no dropout"
    if request.weights:
        return "returns no attention weights"
    if request.visibility == PACKED:
        return "takes no packed documents"
    if request.windowed and not request.causal:
        return "takes a window only where attention is causal"
    device = Device(request.device, request.capability)
    if reason := why_not(device, request.dtype, request.head_dim, request.value_dim):
        return reason
    return None if HAS_TRITON else "triton is not installed"


class _Narrow(NamedTuple):
    """What the kernel is told of who sees what: where a row's keys begin and end, int32 [B] each, and a mask."""

    first: Tensor | None
    end: Tensor | None
    mask: Tensor | None


def _narrow(seen: Visibility, device: torch.device, tracing: bool) -> _Narrow:
    """Worked out once a forward."""
    first, end = seen.bounds if isinstance(seen, Padded) else (None, None)
    # the kernel aligns queries at each row's last valid key, a padded batch at the last key of all
    if isinstance(seen, Full) or (isinstance(seen, Padded) and not seen.restrict_queries):
        return _Narrow(first, end, None)
    from hf_attn_patch.attn.kernels import decode

    mask = seen.dense(device)
    assert mask is not None
    if tracing or seen.keys <= decode.SHORT:
        return _Narrow(first, end, mask)
    if decode.has_words(mask, seen.q_len):
        whole = mask
        mask = seen.form(("words", device), lambda: decode.mask_words(whole), device)
    if isinstance(seen, Dense) and not seen.facts.per_head_mask:
        every = mask.expand(seen.batch, -1, -1, -1)
        first, end = seen.form(("bounds", device), lambda: decode.mask_bounds(every), device)
    return _Narrow(first, end, mask)


def shorter(request: AttentionRequest, seen: Visibility) -> Callable[..., tuple[Tensor, None]] | None:
    """:func:`run` for decoding without padding or bias, straight to the launch; None for all other calls."""
    if not isinstance(seen, Full) or not seen.whole or request.bias or request.tracing:
        return None
    from hf_attn_patch.attn.kernels.decode_launch import launch

    causal, left = seen.causal, seen.window[0]
    window = None if left is None else left + 1

    def straight(q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands) -> tuple[Tensor, None]:
        if type(q) is not Tensor or operators_are_watched():  # both want the registered operator
            return run(q, k, v, request, operands)
        scale, softcap, sinks = operands.scale, operands.softcap, operands.sinks
        numbers = (q, k, v, None, None, None, None, None, sinks, None, None, scale, causal, window, softcap, False)
        return launch(new_tuple(DecodeOperands, numbers))[0], None

    return straight


def run(q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands) -> tuple[Tensor, None]:
    """q [B, HQ, Sq, D], k [B, HKV, Sk, D], v [B, HKV, Sk, Dv] -> (out [B, HQ, Sq, Dv], None)."""
    k, v = cut(operands.visibility, k, v)
    return _over(q, k, v, operands, _narrow(operands.visibility, q.device, request.tracing)), None


def over_codes(q: Tensor, parted: Parted, operands: Operands) -> Tensor:
    """The same for codes (``attn/codes.py``) that no rows share."""
    seen, coded, scales = operands.visibility, parted.coded, parted.scales
    assert coded is not None
    assert scales is not None
    k, v = cut(seen, as_codes(parted.keys, coded.kind.keys), as_codes(parted.values, coded.kind.values))
    k_scale, v_scale = (t.squeeze(-1) for t in cut(seen, *scales))
    return _over(q, k, v, operands, _narrow(seen, q.device, False), k_scale, v_scale)


def _over(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
    narrow: _Narrow,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    from hf_attn_patch.attn.kernels import decode  # needs triton

    seen, (first, end, mask) = operands.visibility, narrow
    left = seen.window[0] if mask is None else None
    out = decode.grouped_decode(
        q,
        k,
        v,
        scale=operands.scale,
        causal=seen.causal and mask is None,
        first=first,
        end=end,
        mask=mask,
        bias=None if operands.bias is None else cut_bias(seen, operands.bias),
        window=None if left is None else left + 1,
        softcap=operands.softcap,
        sinks=operands.sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    assert isinstance(out, Tensor)
    return out
