"""The methods that look at K and V alone: mean, first, random, mean with the norm restored.

Each works in the dtype that it is given (at least fp32) on heads [HKV, D, E] and gives [new HKV, D, E].
Mean-pooling and its controls: Ainslie et al. 2023, arXiv 2305.13245, sections 2.1 and 3.3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_attn_patch.conversion.families.head_layouts import AttentionWeights

from .method import Merge

if TYPE_CHECKING:
    from hf_attn_patch.conversion.plan_data import Plan

Groups = Sequence[range]


def mean_of(heads: Tensor, groups: Groups) -> Tensor:
    """The mean of each group: [HKV, ...] -> [len(groups), ...].

    >>> mean_of(torch.tensor([[1.0], [3.0], [5.0], [9.0]]), [range(0, 2), range(2, 4)])
    tensor([[2.],
            [7.]])
    """
    return torch.stack([heads[group.start : group.stop].mean(dim=0) for group in groups])


def first_of(heads: Tensor, groups: Groups) -> Tensor:
    """The first head of each group: [HKV, ...] -> [len(groups), ...]."""
    return heads[[group.start for group in groups]]


def restore_norm(
    pooled: Tensor, pooled_bias: Tensor | None, heads: Tensor, bias: Tensor | None, groups: Groups
) -> Tensor:
    """The factor [len(groups)] that gives each pooled head the mean Frobenius norm of its group's heads.

    A bias counts as one more input column. Averaging nearly orthogonal heads shrinks the norm by 1/sqrt(G), which
    makes attention flat; this undoes the shrinking.
    """

    def norms(weight: Tensor, column: Tensor | None) -> Tensor:
        square = weight.square().flatten(1).sum(1)
        return (square if column is None else square + column.square().sum(1)).sqrt()

    before, after = mean_of(norms(heads, bias), groups), norms(pooled, pooled_bias)
    return torch.where(after > 0, before / after.clamp_min(torch.finfo(after.dtype).tiny), torch.ones_like(after))


def _pooling(pool: Callable[[Tensor, Groups], Tensor]) -> Merge:
    def merge(weights: AttentionWeights) -> AttentionWeights:
        groups = weights.layer.merged
        changed: dict[str, Any] = {}
        for name in ("k", "k_bias", "v", "v_bias", "k_norm"):
            heads = getattr(weights, name)
            changed[name] = None if heads is None else pool(heads, groups)
        return replace(weights, **changed)

    return merge


def mean(plan: Plan | None = None) -> Merge:
    """K, V, their biases and the K norms' gains are averaged within each group."""
    return _pooling(mean_of)


def first(plan: Plan | None = None) -> Merge:
    """The group's first head stands for all."""
    return _pooling(first_of)


def mean_norm(plan: Plan | None = None) -> Merge:
    """:func:`mean`, each head scaled to the mean norm of the heads that it replaces (norm gains: the plain mean)."""
    pool = mean(plan)

    def merge(weights: AttentionWeights) -> AttentionWeights:
        groups, pooled = weights.layer.merged, pool(weights)
        for name in ("k", "v"):
            heads, bias = getattr(weights, name), getattr(weights, f"{name}_bias")
            if heads is None:
                continue
            new, new_bias = getattr(pooled, name), getattr(pooled, f"{name}_bias")
            scale = restore_norm(new, new_bias, heads, bias, groups)
            setattr(pooled, name, new * scale[:, None, None])
            if new_bias is not None:
                setattr(pooled, f"{name}_bias", new_bias * scale[:, None])
        return pooled

    return merge


def random(plan: Plan) -> Merge:
    """Heads drawn as the architecture draws its own K and V, biases 0, gains averaged; seed and layer decide them."""

    def merge(weights: AttentionWeights) -> AttentionWeights:
        layer = weights.layer
        changed: dict[str, Any] = {}
        for name in ("k", "v"):
            heads, bias = getattr(weights, name), getattr(weights, f"{name}_bias")
            if heads is not None:
                key = f"{plan.seed}/{layer.prefix}{name}".encode()
                generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)
                shape = (layer.new_kv_heads, *heads.shape[1:])
                drawn = torch.randn(shape, generator=generator, dtype=heads.dtype)
                changed[name] = drawn * initial_deviation(plan.text_config, shape[-1])
            if bias is not None:
                changed[f"{name}_bias"] = bias.new_zeros(layer.new_kv_heads, bias.shape[1])
        if weights.k_norm is not None:
            changed["k_norm"] = mean_of(weights.k_norm, layer.merged)
        return replace(weights, **changed)

    return merge


def initial_deviation(config: Any, inputs: int) -> float:
    """The standard deviation of an untrained K or V projection with ``inputs`` inputs.

    T5 scales by the width (its scores are not divided by sqrt(D), so its queries are small instead); with the 0.02 of
    others its new heads would be next to nothing.
    """
    for name in ("initializer_range", "init_std"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    factor = getattr(config, "initializer_factor", None)
    return 0.02 if factor is None else float(factor * inputs**-0.5)
