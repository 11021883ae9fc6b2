"""Kernels that know no grouping: called once a member of the group, and K and V are never repeated.

The gradients that the members give to K, V and what is added are summed at once, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.compat.context_parallel import own_attention
from hf_attn_patch.compat.torch import efficient_attention_op

from ._common import rescale_by_sinks
from ._scores import unseen_of
from ._unseen import without_unseen


def efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, request: AttentionRequest, operands: Operands
) -> Tensor:
    """The memory-efficient kernel knows no grouping, and from Ampere on no row that begins between 16 bytes."""
    save = request.grad or operands.sinks is not None
    DV = v.shape[-1]

    def kernel(q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        found = efficient_attention_op(q, k, v, scores, save, operands.dropout, causal, scale=operands.scale)
        return found[0], found[1]

    return _by_member(_in_units(q), _in_units(k), _in_units(v), mask, request, operands, kernel)[..., :DV]


def _in_units(t: Tensor) -> Tensor:
    """Rows of whole units of 16 bytes: zeros behind them change no score, and no value but those cut off again."""
    unit = 16 // t.itemsize
    if t.shape[-1] % unit:
        return F.pad(t, (0, -t.shape[-1] % unit))
    if t.storage_offset() % unit or any(stride % unit for stride in t.stride()[:-1]):
        return t.clone(memory_format=torch.contiguous_format)
    return t


def public(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, request: AttentionRequest, operands: Operands
) -> Tensor:
    """torch's own function, where torch chooses the kernel. K and V are not repeated there either: for the group it
    would copy them (on MPS, and everywhere with a mask)."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None) -> tuple[Tensor, None]:
        return own_attention(q, k, v, scores, operands.dropout, causal, scale=operands.scale), None

    (B, HQ, Sq, D), HKV = q.shape, k.shape[1]
    if Sq > 1 or HQ == HKV:
        return _by_member(q, k, v, mask, request, operands, kernel)
    if mask is not None and mask.shape[1] == HQ:  # one query: the group as the rows of one head
        mask = mask.reshape(mask.shape[0], HKV, HQ // HKV, mask.shape[-1])
    out = _by_member(q.reshape(B, HKV, HQ // HKV, D), k, v, mask, request, operands, kernel)
    return out.reshape(B, HQ, 1, v.shape[-1])


def _by_member(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    request: AttentionRequest,
    operands: Operands,
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
) -> Tensor:
    """One call of ``kernel`` a member of the group, each on all of K and V as they are. Rows that see nothing are shown
    everything and zeroed afterwards, so that no kernel meets an empty softmax.

    Args:
        kernel: (q [B, HKV, Sq, D], k, v, scores to add or None) -> (out, log-sum-exp).
    """
    (B, HQ, Sq, _), HKV, Sk = q.shape, k.shape[1], k.shape[2]
    G = HQ // HKV
    blind: Tensor | None = None
    masks: tuple[Tensor | None, ...] = (None,) * G
    if mask is not None:
        if request.bias and not request.tracing:
            assert operands.bias is not None
            k, v = unseen_of(operands.visibility, operands.bias, k.device).clean(k, v)
        else:
            k, v = without_unseen(operands.visibility, operands.bias, k, v)
        mask, blind = _aligned_scores(mask, Sk, q.dtype)
        if mask.shape[1] > 1:
            masks = tuple(mask[:, g::G].expand(B, HKV, Sq, Sk) for g in range(G))
        else:
            masks = tuple(part.expand(B, HKV, Sq, Sk) for part in _shared(mask, G))
    outs = []
    for g, (k_g, v_g, part) in enumerate(zip(_shared(k, G), _shared(v, G), masks, strict=True)):
        out, lse = kernel(q[:, g::G], k_g, v_g, part)
        if operands.sinks is not None:
            assert lse is not None
            out = rescale_by_sinks(out, lse[..., :Sq], operands.sinks[g::G])
        outs.append(out)
    out = outs[0] if G == 1 else torch.stack(outs, 2).flatten(1, 2)
    return out if blind is None else out.masked_fill(blind, 0)


def _shared(t: Tensor, G: int) -> tuple[Tensor, ...]:
    """``t`` as G views: autograd adds up their gradients at once, in fp32, not one after another in half precision."""
    return (t,) if G == 1 else t.expand(G, *t.shape).unbind()


def _aligned_scores(mask: Tensor, Sk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A mask as scores to add, in rows of 16-byte alignment (the kernel's wish), and the queries that see nothing."""
    if mask.dtype == torch.bool:
        blind = ~mask.any(-1, keepdim=True)
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        mask = zero.expand(mask.shape).masked_fill(~(mask | blind), -torch.inf)
    else:
        blind = (mask == -torch.inf).all(-1, keepdim=True)
        mask = mask.masked_fill(blind, 0)
    if Sk % 16:
        mask = F.pad(mask.expand(*mask.shape[:-1], Sk), (0, -Sk % 16))[..., :Sk]
    return mask, blind
