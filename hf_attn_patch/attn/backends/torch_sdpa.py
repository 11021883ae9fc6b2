"""PyTorch's own fused kernels: FlashAttention-2 code, cuDNN, memory-efficient (CUDA) and the CPU flash kernel.

The kernels are called through their ATen operators: the choice is ours, not the dispatcher's, and no flag is flipped.
Other devices (AMD's GPUs, MPS, XPU) take torch's public function, and torch chooses there.
K and V are never repeated: where a kernel knows no grouping, it is called once per member of the group. The gradients
of a group are added up in fp32 wherever that is done here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_attn_patch.attn.crossovers import is_small
from hf_attn_patch.attn.devices import needs_nvidia, no_bf16, no_wide_flash_backward
from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.attn.visibility import FULL, NO_WINDOW, PACKED, Dense, Full, Packed, Visibility, full
from hf_attn_patch.compat.torch import (
    cpu_flash_attention_op,
    cudnn_attention,
    cudnn_attention_op,
    efficient_attention_op,
    flash_attention,
    flash_attention_op,
)

from ._blocks import blocks_of, in_blocks
from ._common import as_dtype, cut, cut_bias, rescale_by_sinks
from ._scores import scores_of, unseen_of
from ._unseen import without_unseen

_sdpa = F.scaled_dot_product_attention
_CPU_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def kernel(request: AttentionRequest) -> str | None:
    """Which takes the request: 'cpu', 'cudnn', 'flash', 'efficient', 'public' (torch's choice); None if none does."""
    masked = request.visibility != FULL or request.bias or request.windowed or (request.causal and not request.square)
    if request.device == "cpu":
        return "cpu"
    if request.device != "cuda":
        return "public"
    if request.head_dim > 1024 or no_bf16(request, request.dtype):
        return None
    same = request.head_dim == request.value_dim
    by_cudnn = same and request.half and request.head_dim <= 128 and request.head_dim % 8 == 0
    # older GPUs and small Blackwell ones have it too, where FlashAttention-2 code is what torch itself prefers
    by_cudnn = by_cudnn and 90 <= request.capability < 120 and not request.deterministic
    if masked or not request.half:
        # cuDNN gives no gradient to what is added, and plans anew for each length: not at each token of a generation
        scored = by_cudnn and request.q_class > 16 and not (request.grad or request.sinks or request.tracing)
        return "cudnn" if scored else "efficient" if request.dtype != torch.float64 else None
    trainable = not request.grad or request.q_class > 1  # cuDNN's backward refuses one query with one key
    if by_cudnn and trainable and not is_small(request):
        return "cudnn"
    flash = same and request.head_dim <= 256 and needs_nvidia(request, 80) is None
    wide = request.grad and no_wide_flash_backward(request, request.head_dim, request.dropout)
    return "flash" if flash and not wide else "efficient"


def missing() -> str | None:
    """It is there wherever torch is."""
    return None


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
    if reason := no_bf16(request, request.dtype):
        return reason
    if chosen == "public" and (request.sinks or request.bias_grad):
        return f"on {request.device} torch's SDPA gives no log-sum-exp for sinks, and a bias no gradient for certain"
    if chosen is None:
        return f"torch has no fused kernel for {request.dtype} with head_dim {request.head_dim} on {request.device}"
    if request.sinks and (request.grad or request.tracing or chosen == "cudnn"):
        return "torch's fused kernels give no gradient through sinks"
    if request.visibility == PACKED and request.tracing:
        return "packed documents need host lengths, which a compiled graph does not have"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands) -> tuple[Tensor, None]:
    """q [B, HQ, Sq, D], k [B, HKV, Sk, D], v [B, HKV, Sk, Dv] -> (out [B, HQ, Sq, Dv], None)."""
    seen = operands.visibility
    if _wants_fp32(request):
        with torch.autocast("cpu", enabled=False):  # which would take the wide operands back to half precision
            wide = request._replace(dtype=torch.float32)
            return run(q.float(), k.float(), v.float(), wide, operands)[0].to(q.dtype), None
    if isinstance(seen, Packed) and operands.bias is None:
        return _documents(q, k, v, seen, request, operands), None
    k, v = cut(seen, k, v)
    causal = isinstance(seen, Full) and seen.causal and seen.window == NO_WINDOW and operands.bias is None
    causal = causal and q.shape[2] == k.shape[2]
    scored = operands.bias is not None or not isinstance(seen, Full) or seen.banded
    if scored and not causal and request.device == "cuda" and kernel(request) == "cudnn":
        return _cudnn_scored(q, k, v, operands), None
    if request.device == "cpu" and operands.bias is None and not request.tracing and (blocks := blocks_of(seen)):
        part = functools.partial(_cpu, causal=False, request=request, operands=operands)
        return in_blocks(q, k, v, blocks, part), None
    mask = None if causal else seen.dense(q.device)
    if operands.bias is not None:
        # the CPU kernel also takes fp32 scores beside half-precision queries
        dtype = torch.float32 if request.device == "cpu" and operands.bias.dtype.itemsize > q.itemsize else q.dtype
        mask = _additive(mask, cut_bias(seen, operands.bias), dtype)
    if request.device == "cpu":
        return _cpu(q, k, v, mask, causal, request, operands), None
    return _cuda(q, k, v, mask, causal, request, operands), None


def _wants_fp32(request: AttentionRequest) -> bool:
    """The CPU kernel's backward adds up dK and dV over queries and group in the dtype of K: up to 5 times the error of
    plain attention in half precision. In fp32 a step takes 1.1 to 1.25 times as long as bf16's, a seventh of fp16's."""
    return request.device == "cpu" and request.half and request.grad


def shorter(request: AttentionRequest, seen: Visibility) -> Callable[..., tuple[Tensor, None]] | None:
    """:func:`run` for the commonest calls, with everything decided that is known of them; None for all others."""
    if request.bias or request.sinks or request.head_dim != request.value_dim or not seen.whole:
        return None
    if _wants_fp32(request):
        return None
    gqa = request.heads != request.kv_heads
    cpu = functools.partial(_cpu_plain, gqa)
    if gqa and request.q_class == 1:
        cpu = functools.partial(_cpu_rows, request.kv_heads, request.group_size, request.head_dim)
    if request.device == "cpu" and isinstance(seen, Dense) and not request.per_head_mask:
        return functools.partial(_cpu_masked, cpu)
    if not isinstance(seen, Full) or seen.window != NO_WINDOW or (seen.causal and not request.square):
        return None
    if request.device == "cpu":
        return functools.partial(cpu, None, seen.causal)
    if kernel(request) == "cudnn":
        return functools.partial(_cudnn_plain, seen.causal)
    if kernel(request) == "flash" and request.head_dim % 8 == 0:
        return functools.partial(_flash_plain, seen.causal)
    return None


def _cpu_masked(
    way: Callable[..., tuple[Tensor, None]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: AttentionRequest,
    operands: Operands,
) -> tuple[Tensor, None]:
    """A written-out mask: straight to the kernel, unless keys that nobody sees would reach its arithmetic."""
    seen = operands.visibility
    if not isinstance(seen, Dense) or seen.has_dead_keys:
        return run(q, k, v, request, operands)
    return way(seen.mask, False, q, k, v, request, operands)


def _cpu_plain(
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
        return _sdpa(q, k, v, mask, 0.0, causal, scale=operands.scale, enable_gqa=True), None
    return _sdpa(q, k, v, mask, 0.0, causal, scale=operands.scale), None


def _cpu_rows(
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
    out = _sdpa(q.reshape(-1, HKV, G, D), k, v, mask, scale=operands.scale)
    return out.reshape(-1, HKV * G, 1, D), None


def _cudnn_plain(
    causal: bool, q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands
) -> tuple[Tensor, None]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    return cudnn_attention(q, k, v, None, request.grad, operands.dropout, causal, False, scale=operands.scale)[0], None


def _flash_plain(
    causal: bool, q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands
) -> tuple[Tensor, None]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    return flash_attention(q, k, v, operands.dropout, causal, False, scale=operands.scale)[0], None


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _cudnn_scored(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Tensor:
    """cuDNN with a mask or bias as scores to add; queries that see nothing come out as zeros. No gradients."""
    scores = scores_of(operands.visibility, operands.bias, q.dtype, q.device)
    k, v = scores.clean(k, v)
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = cudnn_attention(q, k, v, scores.values, False, operands.dropout, False, False, scale=operands.scale)[0]
    return out if scores.blind is None else out.masked_fill_(scores.blind, 0)


def _documents(q: Tensor, k: Tensor, v: Tensor, seen: Packed, request: AttentionRequest, operands: Operands) -> Tensor:
    """Packed documents one after another: no mask, and no work between documents."""
    k, v = cut(seen, k, v)
    if seen.padding is not None:  # documents of their own, whose output is dropped: gradients of NaN would stay
        k, v = (t.masked_fill(seen.padding[:, None, :, None], 0) for t in (k, v))
    q, k, v = (t.transpose(0, 1).flatten(1, 2)[None] for t in (q, k, v))  # [1, H, B * S, D]
    parts: list[Tensor] = []
    for q0, q1, k0, k1 in seen.borders():
        if k1 == k0:  # tokens outside every document
            parts.append(q[:, :, q0:q1, :0] @ k[:, :1, :0, :0] @ v[:, :1, :0])  # zeros, and zeros as gradients
            continue
        one = full(q1 - q0, k1 - k0, seen.causal, seen.window)
        square = q1 - q0 == one.keys
        part = request._replace(
            visibility=FULL, square=square, windowed=one.window != NO_WINDOW, q_class=1 if q1 - q0 == 1 else 17
        )
        inside = operands._replace(visibility=one)
        parts.append(run(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], part, inside)[0])
    out = torch.cat(parts, 2).squeeze(0).unflatten(1, (seen.batch, seen.q_len)).transpose(0, 1)
    return out if seen.padding is None else out.masked_fill(seen.padding[:, None, :, None], 0)


def _additive(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """One float mask of what may be seen and what is added."""
    bias = as_dtype(bias, dtype)
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, request: AttentionRequest, operands: Operands
) -> Tensor:
    width = v.shape[-1]
    if width != q.shape[-1]:
        q, k, v = _same_width(q, k, v)
    # a masked key still meets the arithmetic (0 * NaN). A graph and a backward must be told beforehand; else unseen
    # keys are zeroed, and the work done again, only where it shows in the result
    doubtful = mask is not None and (request.tracing or request.bias or operands.visibility.has_dead_keys)
    if doubtful and (request.tracing or (request.grad and not _finite(k, v))):
        k, v = without_unseen(operands.visibility, operands.bias, k, v)
        doubtful = False
    out = _cpu_kernel(q, k, v, mask, causal, operands)
    if doubtful and not request.grad and math.isnan(out.sum().item()):
        k, v = without_unseen(operands.visibility, operands.bias, k, v)
        out = _cpu_kernel(q, k, v, mask, causal, operands)
    return out[..., :width] if width < q.shape[-1] else out


def _finite(*tensors: Tensor) -> bool:
    return all(math.isfinite(t.detach().sum().item()) for t in tensors)


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


def _cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, request: AttentionRequest, operands: Operands
) -> Tensor:
    q, k, v = _rows(q), _rows(k), _rows(v)
    which = kernel(request)
    if which == "public":
        return _public(q, k, v, mask, causal, request, operands)
    lse: Tensor | None = None
    if which == "cudnn":
        out = cudnn_attention_op(q, k, v, None, request.grad, operands.dropout, causal, False, scale=operands.scale)[0]
    elif which == "flash":
        D = q.shape[-1]
        if D % 8:
            q, k, v = (F.pad(t, (0, -D % 8)) for t in (q, k, v))
        out, lse = flash_attention_op(q, k, v, operands.dropout, causal, False, scale=operands.scale)[:2]
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
    """The memory-efficient kernel knows no grouping."""
    save = request.grad or operands.sinks is not None

    def kernel(q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        found = efficient_attention_op(q, k, v, scores, save, operands.dropout, causal, scale=operands.scale)
        return found[0], found[1]

    return _by_member(q, k, v, mask, request, operands, kernel)


def _public(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, request: AttentionRequest, operands: Operands
) -> Tensor:
    """torch's own function, where torch chooses the kernel. K and V are not repeated there either: for the group it
    would copy them (on MPS, and everywhere with a mask)."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None) -> tuple[Tensor, None]:
        return _sdpa(q, k, v, scores, operands.dropout, causal, scale=operands.scale), None

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
