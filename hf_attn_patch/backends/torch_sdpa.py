"""PyTorch's own fused kernels: FlashAttention-2 code, cuDNN, memory-efficient (CUDA) and the CPU flash kernel.

The kernels are called through their ATen operators: the choice is ours, not the dispatcher's, and no flag is flipped.
K and V are never repeated: where a kernel knows no grouping, it is called once per member of the group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_attn_patch.layout import FULL, PACKED, full
from hf_attn_patch.request import AttentionRequest, Operands

from ._common import cut, cut_bias, rescale_by_sinks, without_dead_keys

aten = torch.ops.aten
_CPU_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def kernel(request: AttentionRequest) -> str | None:
    """Which of the kernels takes the request: 'cpu', 'cudnn', 'flash', 'efficient'; None if none does."""
    masked = request.visibility != FULL or request.bias or request.windowed or (request.causal and not request.square)
    if request.device == "cpu":
        return "cpu"
    if request.device != "cuda" or request.head_dim > 1024:
        return None
    if masked or not request.half:
        return "efficient" if request.dtype != torch.float64 else None
    same = request.head_dim == request.value_dim
    fits = same and request.head_dim <= 128 and request.head_dim % 8 == 0
    trainable = not request.grad or request.q_class > 1  # cuDNN's backward refuses one query with one key
    if fits and trainable and not request.deterministic and request.capability >= 90:
        return "cudnn"
    return "flash" if same and request.head_dim <= 256 else "efficient"


def refuses(request: AttentionRequest) -> str | None:
    """Why not, or None."""
    if request.weights:
        return "fused kernels return no attention weights"
    if request.softcap:
        return "torch's SDPA has no softcap"
    if request.device == "cpu":
        if request.dtype not in _CPU_TYPES:
            return f"the CPU kernel has no {request.dtype}"
        if request.dropout:
            return "the CPU flash kernel has no dropout"
        if request.bias_grad:
            return "the CPU flash kernel gives no gradient to a bias"
        if request.sinks and (request.grad or request.tracing):
            return "the CPU flash kernel gives no gradient through sinks"
        return None
    chosen = kernel(request)
    if chosen is None:
        return f"torch has no fused kernel for {request.dtype} with head_dim {request.head_dim} on {request.device}"
    if request.sinks and (request.grad or request.tracing or chosen == "cudnn"):
        return "torch's fused kernels give no gradient through sinks"
    if request.visibility == PACKED and request.tracing:
        return "packed documents need host lengths, which a compiled graph does not have"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands) -> tuple[Tensor, None]:
    """q [B, HQ, Sq, D], k [B, HKV, Sk, D], v [B, HKV, Sk, Dv] -> (out [B, HQ, Sq, Dv], None)."""
    layout = operands.layout
    if layout.kind == PACKED and operands.bias is None:
        return _documents(q, k, v, request, operands), None
    k, v = cut(layout, k, v)
    causal = layout.causal and layout.kind == FULL and operands.bias is None and layout.window == (None, None)
    causal = causal and q.shape[2] == k.shape[2]
    mask = None if causal else layout.dense(q.device)
    if operands.bias is not None:
        mask = _additive(mask, cut_bias(layout, operands.bias), q.dtype)
    if request.device == "cpu":
        return _cpu(q, k, v, mask, causal, request, operands), None
    return _cuda(q, k, v, mask, causal, request, operands), None


def _documents(q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands) -> Tensor:
    """Packed documents one after another: no mask, and no work between documents."""
    layout = operands.layout
    q, k, v = (t.transpose(0, 1).flatten(1, 2)[None] for t in (q, *cut(layout, k, v)))  # [1, H, B * S, D]
    parts: list[Tensor] = []
    for q0, q1, k0, k1 in layout.borders():
        if k1 == k0:  # tokens outside every document
            parts.append(q.new_zeros(1, q.shape[1], q1 - q0, v.shape[-1]))
            continue
        one = full(q1 - q0, k1 - k0, layout.causal, layout.window)
        square = q1 - q0 == one.keys
        part = request._replace(
            visibility=FULL, square=square, windowed=one.window != (None, None), q_class=1 if q1 - q0 == 1 else 17
        )
        inside = operands._replace(layout=one)
        parts.append(run(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], part, inside)[0])
    out = torch.cat(parts, 2)[0].unflatten(1, (layout.batch, layout.q_len)).transpose(0, 1)
    return out if layout.padding is None else out.masked_fill(layout.padding[:, None, :, None], 0)


def _additive(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """One float mask of what may be seen and what is added."""
    bias = bias.to(dtype)
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, request: AttentionRequest, operands: Operands
) -> Tensor:
    width = v.shape[-1]
    if width != q.shape[-1]:
        q, k, v = _same_width(q, k, v)
    out = _cpu_kernel(q, k, v, mask, causal, operands)
    # a masked key still meets the arithmetic (0 * NaN): where that shows, padding is zeroed and the work done again
    if mask is not None and not request.tracing and math.isnan(out.sum().item()):
        k, v = _blank(mask, k, v) if mask.dtype == torch.bool else without_dead_keys(operands.layout, k, v)
        out = _cpu_kernel(q, k, v, mask, causal, operands)
    return out[..., :width] if width < q.shape[-1] else out


def _blank(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    dead = ~mask.flatten(1, 2).any(1)
    return tuple(t.masked_fill(dead[:, None, :, None], 0) for t in tensors)


def _cpu_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, operands: Operands) -> Tensor:
    (B, HQ, Sq, D), HKV = q.shape, k.shape[1]
    sinks, scale = operands.sinks, operands.scale
    if sinks is None:
        if Sq > 1 or HQ == HKV:
            return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=HQ != HKV)
        # the group becomes the rows of one head: K and V are read once (1.3 to 7.6 times faster than enable_gqa)
        if mask is not None and mask.shape[1] == HQ:
            mask = mask.reshape(mask.shape[0], HKV, HQ // HKV, mask.shape[-1])
        out = F.scaled_dot_product_attention(q.reshape(B, HKV, HQ // HKV, D), k, v, mask, scale=scale)
        return out.reshape(B, HQ, 1, v.shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=q.dtype).expand(mask.shape).masked_fill(~mask, -torch.inf)
    if mask is not None:
        mask = mask.expand(B, mask.shape[1], Sq, k.shape[2])
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return rescale_by_sinks(out, lse, sinks)


def _same_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros up to one head_dim for kernels that want D == Dv: scores and the first Dv outputs stay the same."""
    D, Dv = q.shape[-1], v.shape[-1]
    if Dv < D:
        v = F.pad(v, (0, D - Dv))
    elif D < Dv:
        q, k = F.pad(q, (0, Dv - D)), F.pad(k, (0, Dv - D))
    return q, k, v


def _cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, request: AttentionRequest, operands: Operands
) -> Tensor:
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    which = kernel(request)
    lse: Tensor | None = None
    if which == "cudnn":
        out = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, request.grad, operands.dropout, causal, False, scale=operands.scale
        )[0]
    elif which == "flash":
        D = q.shape[-1]
        if D % 8:
            q, k, v = (F.pad(t, (0, -D % 8)) for t in (q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention(
            q, k, v, operands.dropout, causal, False, scale=operands.scale
        )[:2]
        out = out[..., :D]
    else:
        return _efficient(q, k, v, mask, causal, request, operands)
    if operands.sinks is not None:
        assert lse is not None
        out = rescale_by_sinks(out, lse, operands.sinks)
    return out


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, request: AttentionRequest, operands: Operands
) -> Tensor:
    """The memory-efficient kernel knows no grouping: one call a member of the group, each on all of K and V as they
    are. Rows that see nothing are shown everything and zeroed afterwards, so that no kernel meets an empty softmax."""
    (B, HQ, Sq, _), HKV, Sk = q.shape, k.shape[1], k.shape[2]
    G = HQ // HKV
    blind: Tensor | None = None
    if mask is not None:
        if mask.dtype == torch.bool:
            k, v = _blank(mask, k, v)
            blind = ~mask.any(-1, keepdim=True)
            mask = (
                torch.zeros((), dtype=q.dtype, device=q.device)
                .expand(mask.shape)
                .masked_fill(~(mask | blind), -torch.inf)
            )
        else:
            blind = (mask == -torch.inf).all(-1, keepdim=True)
            mask = mask.masked_fill(blind, 0)
        # the kernel wants 16-byte aligned rows
        mask = F.pad(mask, (0, -Sk % 16))[..., :Sk] if Sk % 16 else mask
        mask = mask.expand(B, HQ if mask.shape[1] > 1 else 1, Sq, Sk)
    outs = []
    save = request.grad or operands.sinks is not None
    for g in range(G):
        part = mask
        if mask is not None:
            part = (mask[:, g::G] if mask.shape[1] > 1 else mask).expand(B, HKV, Sq, Sk)
        out, lse = aten._scaled_dot_product_efficient_attention(
            q[:, g::G], k, v, part, save, operands.dropout, causal, scale=operands.scale
        )[:2]
        if operands.sinks is not None:
            out = rescale_by_sinks(out, lse[..., :Sq], operands.sinks[g::G])
        outs.append(out)
    out = outs[0] if G == 1 else torch.stack(outs, 2).flatten(1, 2)
    return out if blind is None else out.masked_fill(blind, 0)
