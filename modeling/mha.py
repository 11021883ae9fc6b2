"""The weights of ``torch.nn.MultiheadAttention`` for GroupedQueryAttention, K and V pooled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def read_mha(mha: nn.MultiheadAttention) -> tuple[dict[str, Any], Callable[[Any], None]]:
    """What GroupedQueryAttention is built with to be like ``mha``, and how its weights get into it.

    Raises:
        ValueError: ``mha`` has ``add_bias_kv`` or ``add_zero_attn``, or different widths for keys and values.
    """
    if mha.bias_k is not None or mha.add_zero_attn:
        raise ValueError("an extra key (add_bias_kv, add_zero_attn) has no place in GroupedQueryAttention")
    if mha.kdim != mha.vdim:
        raise ValueError(f"keys of width {mha.kdim} and values of width {mha.vdim}: they must be made from one input")
    joined: Tensor | None = mha.in_proj_weight
    weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight) if joined is None else joined.chunk(3)
    biases = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)

    def copy(out: Any) -> None:
        for projection, weight, bias in zip((out.q_proj, out.k_proj, out.v_proj), weights, biases, strict=True):
            heads = projection.out_features // out.head_dim
            projection.weight.copy_(_pooled(weight, heads, out.head_dim))
            if bias is not None:
                projection.bias.copy_(_pooled(bias, heads, out.head_dim))
        out.o_proj.weight.copy_(mha.out_proj.weight)
        if mha.out_proj.bias is not None:
            out.o_proj.bias.copy_(mha.out_proj.bias)

    shapes = {
        "embed_dim": mha.embed_dim,
        "num_heads": mha.num_heads,
        "kv_dim": mha.kdim,
        "dropout": mha.dropout,
        "bias": mha.in_proj_bias is not None,
        "batch_first": mha.batch_first,
        "device": weights[0].device,
        "dtype": weights[0].dtype,
    }
    return shapes, copy


def _pooled(rows: Tensor, heads: int, head_dim: int) -> Tensor:
    """[H * D, ...] -> [heads * D, ...]: the mean of each group's heads."""
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return exact.unflatten(0, (heads, -1, head_dim)).mean(1).flatten(0, 1)
