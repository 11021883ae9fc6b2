"""FlashAttention-3 by its bare operators, as xformers 0.0.34 brings them: ``torch.ops.flash_attn_3`` without Python.

The functions take and give what those of ``flash_attn_interface`` do. The build has no softcap, no dropout, no sinks.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load() -> Any:
    """The functions over the operators inside an installed xformers; None if there are none that can be loaded.

    xformers itself is not imported: it would bring far more than the operators.
    """
    spec = importlib.util.find_spec("xformers")
    folders = (spec.submodule_search_locations if spec else None) or []
    libraries = [library for folder in folders for library in sorted(Path(folder, "flash_attn_3").glob("_C*.so"))]
    if not libraries:
        return None
    try:
        torch.ops.load_library(libraries[0])
    except OSError:  # made for another CUDA or torch
        return None
    return Functions(torch.ops.flash_attn_3)


class Functions:
    """``flash_attn_func``, ``flash_attn_varlen_func`` and ``flash_attn_with_kvcache`` over a namespace of operators.

    Args:
        operators: has ``fwd`` and ``bwd`` with the schemas of xformers 0.0.34's build.
    """

    softcap = False

    def __init__(self, operators: Any) -> None:
        self.operators = operators

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """q [B, Sq, HQ, D], k and v [B, Sk, HKV, D], fp16 or bf16 -> [B, Sq, HQ, D]."""
        return self._apply(q, k, v, None, None, None, None, **options)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **options: Any,
    ) -> Tensor:
        """q [T, HQ, D], k and v [Tk, HKV, D], int32 cumulative lengths -> [T, HQ, D]."""
        return self._apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache_seqlens: Tensor | int,
        cache_leftpad: Tensor | None = None,
        page_table: Tensor | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        num_splits: int = 0,
    ) -> Tensor:
        """q [B, Sq, HQ, D], caches [B, Sk, HKV, D] of which ``cache_seqlens`` keys are valid -> [B, Sq, HQ, D]."""
        _no_softcap(softcap)
        if isinstance(cache_seqlens, int):
            cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
        out: Tensor = self.operators.fwd(
            q,
            k,
            v,
            seqused_k=cache_seqlens,
            page_table=page_table,
            leftpad_k=cache_leftpad,
            softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
            is_causal=causal,
            window_size_left=window_size[0],
            window_size_right=window_size[1],
            num_splits=num_splits,
        )[0]
        return out

    def _apply(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        max_q: int | None,
        max_k: int | None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        _no_softcap(softcap)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        numbers = (scale, causal, *window_size, deterministic)
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        out: Tensor = _Attention.apply(self.operators, q, k, v, cu_q, cu_k, max_q, max_k, *numbers)
        return out


def _no_softcap(softcap: float) -> None:
    if softcap:
        raise ValueError("this build of FlashAttention-3 has no softcap")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operators: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        max_q: int | None,
        max_k: int | None,
        scale: float,
        causal: bool,
        left: int,
        right: int,
        deterministic: bool,
    ) -> Tensor:
        lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        window = {"is_causal": causal, "window_size_left": left, "window_size_right": right}
        out, lse, *_ = operators.fwd(q, k, v, **lengths, softmax_scale=scale, **window, num_splits=1)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.operators, ctx.maxima, ctx.window = operators, (max_q, max_k), window
        ctx.scale, ctx.deterministic = scale, deterministic
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
        ctx.operators.bwd(
            d_out.contiguous(),
            q,
            k,
            v,
            out,
            lse,
            *grads,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=ctx.maxima[0],
            max_seqlen_k=ctx.maxima[1],
            softmax_scale=ctx.scale,
            **ctx.window,
            deterministic=ctx.deterministic,
        )
        return (None, *grads, *[None] * 9)
