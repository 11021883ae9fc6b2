"""PyTorch's own fused kernels: FlashAttention-2 code, cuDNN, memory-efficient (CUDA) and the CPU flash kernel.

The kernels are called through their ATen operators: the choice is ours, not the dispatcher's, and no flag is flipped.
Other devices (AMD's GPUs, MPS, XPU) take torch's public function, and torch chooses there.
K and V are never repeated: where a kernel knows no grouping, it is called once per member of the group. The gradients
of a group are added up in fp32 wherever that is done here.

The choice stands here; the calls are in ``_sdpa_cpu``, ``_sdpa_cuda`` and ``_sdpa_members``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hf_attn_patch.attn.crossovers import is_small
from hf_attn_patch.attn.devices import needs_nvidia, no_bf16, no_wide_flash_backward
from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.attn.visibility import FULL, NO_WINDOW, PACKED, Dense, Full, Packed, Visibility, full

from . import _sdpa_cpu, _sdpa_cuda, _sdpa_members
from ._blocks import blocks_of, in_blocks
from ._common import as_dtype, cut, cut_bias

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
    if _sdpa_cpu.wants_fp32(request):
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
        return _sdpa_cuda.cudnn_scored(q, k, v, operands), None
    if request.device == "cpu" and operands.bias is None and not request.tracing and (blocks := blocks_of(seen)):
        part = functools.partial(_sdpa_cpu.flash, causal=False, request=request, operands=operands)
        return in_blocks(q, k, v, blocks, part), None
    mask = None if causal else seen.dense(q.device)
    if operands.bias is not None:
        # the CPU kernel also takes fp32 scores beside half-precision queries
        dtype = torch.float32 if request.device == "cpu" and operands.bias.dtype.itemsize > q.itemsize else q.dtype
        mask = _additive(mask, cut_bias(seen, operands.bias), dtype)
    if request.device == "cpu":
        return _sdpa_cpu.flash(q, k, v, mask, causal, request, operands), None
    which = kernel(request)
    if which == "cudnn" or which == "flash":
        return _sdpa_cuda.fused(which, q, k, v, causal, request, operands), None
    q, k, v = (_sdpa_cuda.contiguous_rows(t) for t in (q, k, v))
    call = _sdpa_members.public if which == "public" else _sdpa_members.efficient
    return call(q, k, v, mask, causal, request, operands), None


def shorter(request: AttentionRequest, seen: Visibility) -> Callable[..., tuple[Tensor, None]] | None:
    """:func:`run` for the commonest calls, with everything decided that is known of them; None for all others."""
    if request.bias or request.sinks or request.head_dim != request.value_dim or not seen.whole:
        return None
    if _sdpa_cpu.wants_fp32(request):
        return None
    gqa = request.heads != request.kv_heads
    cpu = functools.partial(_sdpa_cpu.plain, gqa)
    if gqa and request.q_class == 1:
        cpu = functools.partial(_sdpa_cpu.rows, request.kv_heads, request.group_size, request.head_dim)
    if request.device == "cpu" and isinstance(seen, Dense) and not request.per_head_mask:
        return functools.partial(_cpu_masked, cpu)
    if not isinstance(seen, Full) or seen.window != NO_WINDOW or (seen.causal and not request.square):
        return None
    if request.device == "cpu":
        return functools.partial(cpu, None, seen.causal)
    if kernel(request) == "cudnn":
        return functools.partial(_sdpa_cuda.cudnn_plain, seen.causal)
    if kernel(request) == "flash" and request.head_dim % 8 == 0:
        return functools.partial(_sdpa_cuda.flash_plain, seen.causal)
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
