"""FlashAttention-3 (module ``flash_attn_interface``, or the build inside xformers): Hopper."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor

from hf_attn_patch.attn.devices import lacks, needs_nvidia
from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.attn.visibility import Full

from . import _flash3_ops
from ._common import cut
from ._varlen import output_of, refuses_common, run_varlen

_NAMES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")


@functools.cache
def module() -> Any:
    """What has ``flash_attn_func`` and ``flash_attn_varlen_func``, or None."""
    for name in _NAMES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return _flash3_ops.load()


def missing() -> str | None:
    """Why nothing of it can run here, or None."""
    return absent() or lacks(90, 100)


@functools.cache
def absent() -> str | None:
    """Why the package cannot be used, or None."""
    if module() is None:
        return (
            "flash_attn_interface is not installed (build FlashAttention's hopper folder, or install xformers 0.0.34)"
        )
    return None


def refuses(request: AttentionRequest) -> str | None:
    """Why not, or None."""
    if reason := refuses_common(request, 256) or needs_nvidia(request, 90, 100) or absent():
        return reason
    for fact, name in ((request.dropout, "dropout"), (request.sinks, "sinks")):
        if fact:
            return f"FlashAttention-3 has no {name}"
    if request.softcap and not getattr(module(), "softcap", True):
        return "the build of FlashAttention-3 inside xformers has no softcap"
    if request.deterministic and request.grad and request.head_dim > 192:
        return "FlashAttention-3 has no deterministic backward for head_dim 256"
    if request.softcap and request.grad:
        return "FlashAttention-3 builds commonly have no softcap in the backward"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands) -> tuple[Tensor, None]:
    """q [B, HQ, Sq, D], k [B, HKV, Sk, D], v [B, HKV, Sk, D] -> (out [B, HQ, Sq, D], None)."""
    seen = operands.visibility
    window = tuple(-1 if side is None else side for side in seen.window)
    options: dict[str, Any] = {
        "softmax_scale": operands.scale,
        "causal": seen.causal,
        "window_size": window,
        "softcap": operands.softcap or 0.0,
        "deterministic": request.deterministic,
    }
    if isinstance(seen, Full):
        k, v = cut(seen, k, v)
        out = module().flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), **options)
        return output_of(out).transpose(1, 2), None

    def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        return output_of(module().flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options))

    return run_varlen(q, k, v, operands, kernel, clean=True), None
