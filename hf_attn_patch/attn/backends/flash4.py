"""FlashAttention-4 (package ``flash-attn-4``, module ``flash_attn.cute``): Hopper and newer, forward and backward."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor

from hf_attn_patch.attn.devices import lacks, needs_nvidia
from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.attn.visibility import Full

from ._common import cut, installed
from ._varlen import output_of, refuses_common, run_varlen


@functools.cache
def _module() -> Any:
    return importlib.import_module("flash_attn.cute")


def missing() -> str | None:
    """Why nothing of it can run here, or None."""
    return absent() or lacks(90, 120)


@functools.cache
def absent() -> str | None:
    """Why the package cannot be used, or None."""
    if not installed("flash_attn.cute"):
        return "flash-attn-4 is not installed (pip install 'hf-attn-patch[flash]')"
    return None


def refuses(request: AttentionRequest) -> str | None:
    """Why not, or None."""
    if reason := refuses_common(request, 256) or needs_nvidia(request, 90, 120) or absent():
        return reason
    if request.dropout:
        return "FlashAttention-4 has no dropout"
    if request.head_dim % 32:
        return f"FlashAttention-4 gives wrong results with head_dim {request.head_dim} (seen with 4.0.0b36 on Hopper)"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands) -> tuple[Tensor, None]:
    """q [B, HQ, Sq, D], k [B, HKV, Sk, D], v [B, HKV, Sk, D] -> (out [B, HQ, Sq, D], None)."""
    seen = operands.visibility
    sinks = operands.sinks
    options = {
        "softmax_scale": operands.scale,
        "causal": seen.causal and seen.window == (None, None),
        "window_size": (seen.window[0], 0 if seen.causal else seen.window[1])
        if seen.window != (None, None)
        else (None, None),
        "softcap": operands.softcap or 0.0,
        "learnable_sink": None if sinks is None else sinks.to(q.dtype),
        "deterministic": request.deterministic,
    }
    if isinstance(seen, Full):
        k, v = cut(seen, k, v)
        out = _module().flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), **options)
        return output_of(out).transpose(1, 2), None

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        return output_of(
            _module().flash_attn_varlen_func(
                q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, **options
            )
        )

    return run_varlen(q, k, v, operands, kernel, clean=True), None
