"""FlashAttention-2 (package ``flash-attn``): Ampere and newer; dropout, softcap and deterministic backward."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor

from hf_attn_patch.attn.devices import lacks, needs_nvidia, no_wide_flash_backward
from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.attn.visibility import Full

from ._common import cut, installed
from ._varlen import refuses_common, run_varlen


@functools.cache
def _module() -> Any:
    return importlib.import_module("flash_attn")


def missing() -> str | None:
    """Why nothing of it can run here, or None."""
    return absent() or lacks(80)


@functools.cache
def absent() -> str | None:
    """Why the package cannot be used, or None."""
    if not installed("flash_attn.flash_attn_interface"):
        return "flash-attn is not installed (pip install 'hf-attn-patch[flash2]')"
    return None


def refuses(request: AttentionRequest) -> str | None:
    """Why not, or None."""
    if reason := refuses_common(request, 256):
        return reason
    if request.device == "hip":
        return "FlashAttention-2's build for AMD GPUs was never tried with hf_attn_patch"
    if reason := needs_nvidia(request, 80) or absent():
        return reason
    if request.grad and (reason := no_wide_flash_backward(request, request.head_dim, request.dropout)):
        return reason
    if request.sinks:
        return "FlashAttention-2 has no sinks"
    if request.softcap and request.dropout:
        return "FlashAttention-2 has no softcap together with dropout"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands) -> tuple[Tensor, None]:
    """q [B, HQ, Sq, D], k [B, HKV, Sk, D], v [B, HKV, Sk, D] -> (out [B, HQ, Sq, D], None)."""
    seen = operands.visibility
    options: dict[str, Any] = {
        "dropout_p": operands.dropout,
        "softmax_scale": operands.scale,
        "causal": seen.causal,
        "window_size": tuple(-1 if side is None else side for side in seen.window),
        "softcap": operands.softcap or 0.0,
        "deterministic": request.deterministic,
    }
    if isinstance(seen, Full):
        k, v = cut(seen, k, v)
        out: Tensor = _module().flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), **options)
        return out.transpose(1, 2), None

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        varlen: Tensor = _module().flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options)
        return varlen

    return run_varlen(q, k, v, operands, kernel), None
