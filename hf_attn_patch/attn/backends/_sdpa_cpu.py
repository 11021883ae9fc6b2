"""torch's flash kernel on the CPU: grouping, masks, unseen keys, sinks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.compat.context_parallel import own_attention
from hf_attn_patch.compat.torch import cpu_flash_attention_op

from ._common import rescale_by_sinks
from ._unseen import without_unseen


def wants_fp32(request: AttentionRequest) -> bool:
    """The CPU kernel's backward adds up dK and dV over queries and group in the dtype of K: up to 5 times the error of
    plain attention in half precision. In fp32 a step takes 1.1 to 1.25 times as long as bf16's, a seventh of fp16's."""
    return request.device == "cpu" and request.half and request.grad


def flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, request: AttentionRequest, operands: Operands
) -> Tensor:
    """One call of the kernel, so that no key that is hidden reaches the result: mask is bool, or scores to add."""
    width = v.shape[-1]
    if width != q.shape[-1]:
        q, k, v = _same_width(q, k, v)
    # a masked key still meets the arithmetic (0 * NaN). A graph and a backward must be told beforehand; else unseen
    # keys are zeroed, and the work done again, only where it shows in the result
    doubtful = mask is not None and (request.tracing or request.bias or operands.visibility.has_dead_keys)
    if doubtful and (request.tracing or (request.grad and not _finite(k, v))):
        k, v = without_unseen(operands.visibility, operands.bias, k, v)
        doubtful = False
    out = _kernel(q, k, v, mask, causal, operands)
    if doubtful and not request.grad and math.isnan(out.sum().item()):
        k, v = without_unseen(operands.visibility, operands.bias, k, v)
        out = _kernel(q, k, v, mask, causal, operands)
    return out[..., :width] if width < q.shape[-1] else out


def _finite(*tensors: Tensor) -> bool:
    return all(math.isfinite(t.detach().sum().item()) for t in tensors)


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, operands: Operands) -> Tensor:
    (B, HQ, Sq, D), HKV = q.shape, k.shape[1]
    sinks, scale = operands.sinks, operands.scale
    if sinks is None:
        if Sq > 1 or HQ == HKV:
            return own_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=HQ != HKV)
        # the group becomes the rows of one head: K and V are read once (1.3 to 7.6 times faster than enable_gqa)
        if mask is not None and mask.shape[1] == HQ:
            mask = mask.reshape(mask.shape[0], HKV, HQ // HKV, mask.shape[-1])
        out = own_attention(q.reshape(B, HKV, HQ // HKV, D), k, v, mask, scale=scale)
        return out.reshape(B, HQ, 1, v.shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=q.dtype).expand(mask.shape).masked_fill(~mask, -torch.inf)
    if mask is not None:
        mask = mask.expand(B, mask.shape[1], Sq, k.shape[2])
    out, lse = cpu_flash_attention_op(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return rescale_by_sinks(out, lse, sinks)


def _same_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros up to one head_dim for kernels that want D == Dv: scores and the first Dv outputs stay the same."""
    D, Dv = q.shape[-1], v.shape[-1]
    if Dv < D:
        v = F.pad(v, (0, D - Dv))
    elif D < Dv:
        q, k = F.pad(q, (0, Dv - D)), F.pad(k, (0, Dv - D))
    return q, k, v


def plain(
    gqa: bool,
    mask: Tensor | None,
    causal: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: AttentionRequest,
    operands: Operands,
) -> tuple[Tensor, None]:
    if gqa:
        return own_attention(q, k, v, mask, 0.0, causal, scale=operands.scale, enable_gqa=True), None
    return own_attention(q, k, v, mask, 0.0, causal, scale=operands.scale), None


def rows(
    HKV: int,
    G: int,
    D: int,
    mask: Tensor | None,
    causal: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: AttentionRequest,
    operands: Operands,
) -> tuple[Tensor, None]:
    """One query: the group as the rows of one head. Sizes are given one by one: a tuple costs half a microsecond."""
    out = own_attention(q.reshape(-1, HKV, G, D), k, v, mask, scale=operands.scale)
    return out.reshape(-1, HKV * G, 1, D), None
