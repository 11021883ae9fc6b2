"""What the kernels that take cumulative lengths share: FlashAttention 2, 3, 4 and torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.attn.visibility import DENSE, Packed, Padded

from ._common import cut
from ._unseen import without_unseen, without_unseen_of_documents

#: kernel(q [T, HQ, D], k [Tk, HKV, D], v, cu_q, cu_k, max_q, max_k) -> out [T, HQ, Dv]
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


def refuses_common(request: AttentionRequest, largest: int, step: int = 8) -> str | None:
    """What no FlashAttention takes."""
    if request.device not in ("cuda", "hip"):
        return "needs a CUDA device"
    if request.tracing:
        return "is not traceable by torch.compile"
    if not request.half:
        return f"takes fp16 and bf16, not {str(request.dtype).removeprefix('torch.')}"
    if request.weights:
        return "returns no attention weights"
    if request.bias:
        return "takes no additive bias"
    if request.visibility == DENSE:
        return "takes no dense mask"
    if request.head_dim > largest or request.head_dim % step or request.value_dim != request.head_dim:
        return f"takes head_dim up to {largest} in steps of {step}, not {request.head_dim}/{request.value_dim}"
    return None


def output_of(result: Any) -> Tensor:
    """The output alone, of a kernel that in some releases also gives the log-sum-exp."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def run_varlen(q: Tensor, k: Tensor, v: Tensor, operands: Operands, kernel: Kernel, *, clean: bool = False) -> Tensor:
    """A padded or packed request through ``kernel``, without gathering a token.

    Padding: rows become segments (:meth:`Padded.segments`) over the tokens as they lie. Packed: the documents.

    Args:
        clean: zero K and V at padding, for kernels whose tiles reach beyond a segment (0 * NaN is NaN).
    """
    seen = operands.visibility
    if not isinstance(seen, (Padded, Packed)):
        raise TypeError(f"{type(seen).__name__} has no segments")
    B, HQ, Sq, _ = q.shape
    k, v = cut(seen, k, v)
    padding: Tensor | None = None
    if isinstance(seen, Padded):
        if clean:
            k, v = without_unseen(seen, None, k, v)
        cu_q, cu_k = seen.segments()
        max_q, max_k = Sq, seen.keys
    else:
        cu_q, cu_k, max_q, max_k, padding = seen.cu_q, seen.cu_k, seen.max_q, seen.max_k, seen.padding
        if clean:
            k, v = without_unseen_of_documents(seen, k, v)
        elif padding is not None:  # documents of their own: their output is dropped, their gradient is not
            k, v = (t.masked_fill(padding[:, None, :, None], 0) for t in (k, v))
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    max_q = max(2, max_q)  # at 1, FlashAttention-2 takes every segment to hold one query, and some hold none
    out = kernel(q, k, v, cu_q, cu_k, max_q, max_k).unflatten(0, (B, Sq)).transpose(1, 2)
    return out if padding is None else out.masked_fill(padding[:, None, :, None], 0)
