"""From a checkpoint's tensors to heads and back: the only place that knows fused and interleaved layouts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from .layer import LayerAttention
from .table import Projection

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass
class AttentionWeights:
    """The weights of one attention layer, by heads; what a method does not get is None.

    Shapes before (after) a conversion: q [HQ, D, E], k [HKV (new HKV), D, E], v [HKV (new HKV), Dv, E], a gate g
    [HQ, Dv, E], o [HQ, E, Dv]; biases [heads, D] for q, k, v, g and [E] for o; norms' gains [heads, D]; sinks [HQ].
    Floating point, at least fp32. Which tensors exist is the checkpoint's choice: a method gives back those that it
    got, in the new shapes.
    """

    layer: LayerAttention
    q: Tensor | None = None
    q_bias: Tensor | None = None
    k: Tensor | None = None
    k_bias: Tensor | None = None
    v: Tensor | None = None
    v_bias: Tensor | None = None
    g: Tensor | None = None
    g_bias: Tensor | None = None
    o: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    sinks: Tensor | None = None

    def on(self, device: torch.device | str) -> AttentionWeights:
        """The same with all tensors on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layer"}
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **moved)


def split(
    projection: Projection, out: Tensor, heads: int, kv_heads: int, head_dim: int, value_dim: int | None = None
) -> dict[str, Tensor]:
    """Take the outputs of a projection apart.

    Args:
        out: [rows, ...]: a weight [rows, E] (already the right way round) or a bias [rows].
        value_dim: Dv; None: D. Other than D only where the projection holds one role.

    Returns:
        for each of the letters in ``projection.holds``: [heads or kv_heads, D or Dv, ...].
    """
    rest = out.shape[1:]
    if len(projection.holds) == 1 and projection.holds in "vg":
        head_dim = value_dim or head_dim
    if projection.form == "heads":
        each = out.reshape(-1, len(projection.holds), head_dim, *rest)
        return {role: each[:, i] for i, role in enumerate(projection.holds)}
    if projection.form == "groups":
        size = heads // kv_heads
        grouped = out.reshape(kv_heads, size + 2, head_dim, *rest)
        return {
            "q": grouped[:, :size].reshape(heads, head_dim, *rest),
            "k": grouped[:, size],
            "v": grouped[:, size + 1],
        }
    blocks = math.gcd(projection.blocks, kv_heads) if projection.blocks > 1 else 1
    counts = [heads if role in "qg" else kv_heads for role in projection.holds]
    blocked = out.reshape(blocks, sum(counts) // blocks, head_dim, *rest)
    parts = blocked.split([n // blocks for n in counts], dim=1)
    return {
        role: part.reshape(n, head_dim, *rest) for role, n, part in zip(projection.holds, counts, parts, strict=True)
    }


def join(projection: Projection, parts: dict[str, Tensor]) -> Tensor:
    """The inverse of :func:`split`: [rows, ...] from [heads, D, ...]."""
    import torch

    first = parts[projection.holds[0]]
    head_dim, rest = first.shape[1], first.shape[2:]
    if projection.form == "heads":
        return torch.stack([parts[role] for role in projection.holds], 1).reshape(-1, *rest)
    if projection.form == "groups":
        q, k, v = parts["q"], parts["k"], parts["v"]
        kv_heads = k.shape[0]
        grouped = torch.cat([q.reshape(kv_heads, -1, head_dim, *rest), k[:, None], v[:, None]], dim=1)
        return grouped.reshape(-1, *rest)
    blocks = math.gcd(projection.blocks, parts["k"].shape[0]) if projection.blocks > 1 else 1
    blocked = [parts[role].reshape(blocks, -1, head_dim, *rest) for role in projection.holds]
    return torch.cat(blocked, dim=1).reshape(-1, *rest)
