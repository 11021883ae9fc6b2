"""Our own Triton kernels for an additive bias with its gradient: many queries, dropout, any mask, nothing compiled anew
for a new length.

What T5 and models with ALiBi train with, in half precision: measured against flex_attention and the memory-efficient
kernel in ``benchmarks/results/kernels.md``.
"""

from __future__ import annotations

from torch import Tensor

from hf_attn_patch.attn.devices import HAS_TRITON, interpreted, lacks, needs_nvidia, no_bf16
from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.attn.visibility import Dense, Packed, Padded

from ._common import cut, cut_bias
from ._scores import readable_of, unseen_of

_WIDEST = 128


def missing() -> str | None:
    """Why Triton cannot run here, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    return None if interpreted() else lacks(80)


def refuses(request: AttentionRequest) -> str | None:
    """Why not, or None."""
    if not interpreted() and (reason := needs_nvidia(request, 80)):
        return reason
    if not request.bias:
        return "is for calls with an additive bias"
    for name, what in (("softcap", "no softcap"), ("sinks", "no sinks")):
        if getattr(request, name):
            return f"takes {what}"
    if request.weights:
        return "returns no attention weights"
    if request.tracing:
        return "is not traceable by torch.compile"
    if request.dtype.itemsize not in (2, 4):
        return f"takes fp16, bf16 and fp32, not {str(request.dtype).removeprefix('torch.')}"
    if reason := no_bf16(request, request.dtype):
        return reason
    if request.head_dim > _WIDEST or request.value_dim > _WIDEST:
        return f"takes head_dim up to {_WIDEST}, not {request.head_dim}/{request.value_dim}"
    return None if HAS_TRITON else "triton is not installed"


def run(q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands) -> tuple[Tensor, None]:
    """q [B, HQ, Sq, D], k [B, HKV, Sk, D], v [B, HKV, Sk, Dv] -> (out [B, HQ, Sq, Dv], None)."""
    from hf_attn_patch.attn.kernels.biased import Biased, biased_attention  # needs triton

    seen, bias = operands.visibility, operands.bias
    assert bias is not None
    k, v = cut(seen, k, v)
    call = Biased(operands.scale, seen.sides, dropout=operands.dropout)
    call = call._replace(read=readable_of(seen, bias), clean=unseen_of(seen, bias, k.device).clean)
    if isinstance(seen, Padded):
        call = call._replace(first=seen.bounds[0], end=seen.bounds[1])
    elif isinstance(seen, (Dense, Packed)):
        call = call._replace(sides=(None, None), mask=seen.dense(q.device))
    return biased_attention(q, k, v, cut_bias(seen, bias), call), None
