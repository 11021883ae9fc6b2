"""Attention of one layer written out head by head in fp64: the truth that merged weights are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn_patch.conversion.families.head_layouts import AttentionWeights


def rope(x_SD: Tensor, layout: str, dims: int) -> Tensor:
    """Turn each pair of the first ``dims`` dimensions by position times its frequency, pair by pair."""
    out = x_SD.clone()
    for position in range(len(x_SD)):
        for j in range(dims // 2):
            a, b = (j, j + dims // 2) if layout == "half" else (2 * j, 2 * j + 1)
            angle = torch.tensor(position * 0.4**j, dtype=torch.float64)
            x, y = x_SD[position, a], x_SD[position, b]
            out[position, a] = x * angle.cos() - y * angle.sin()
            out[position, b] = x * angle.sin() + y * angle.cos()
    return out


def attend(weights: AttentionWeights, x_SE: Tensor, memory_SE: Tensor | None = None, causal: bool = True) -> Tensor:
    """The layer's output [S, E] for inputs [S, E]; K and V read ``memory`` where there is one."""
    x, memory = x_SE.double(), (x_SE if memory_SE is None else memory_SE).double()
    assert weights.q is not None and weights.k is not None and weights.o is not None
    rotary = weights.layer.rope, weights.layer.rotary_dims
    HQ, HKV = len(weights.q), len(weights.k)
    out = torch.zeros(len(x), weights.o.shape[1], dtype=torch.float64)
    for h in range(HQ):

        def project(name: str, index: int, source: Tensor) -> Tensor:
            made = source @ getattr(weights, name)[index].double().T
            bias = getattr(weights, f"{name}_bias")
            return made if bias is None else made + bias[index].double()

        kv = h // (HQ // HKV)
        q, k = rope(project("q", h, x), *rotary), rope(project("k", kv, memory), *rotary)
        scores = q @ k.T / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        out += scores.softmax(-1) @ project("v", kv, memory) @ weights.o[h].double().T
    return out
