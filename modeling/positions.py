"""How positions enter :class:`~hf_attn_patch.modeling.GroupedQueryAttention`: RoPE turns q and k, others add a bias.

Each has ``rotate(x, positions)`` for x [B, H, S, D] at integer positions [B or 1, S], and ``bias(q_positions,
k_positions, exact)`` for positions [Sq] and [Sk], which gives [1, HQ, Sq or 1, Sk] or None. With ``exact=False`` a bias
may be off by a constant of each query, which its softmax does not see.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from hf_attn_patch.grouping import divisors


class NoPosition(nn.Module):
    """Order enters nowhere here (learned embeddings elsewhere, or none)."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def bias(self, q_positions: Tensor, k_positions: Tensor, exact: bool = True) -> Tensor | None:
        return None


class Rope(NoPosition):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): plane j turns by ``position * theta ** (-2j / rotary_dim)``.

    Args:
        rotary_dim: the first so many of the D dimensions turn (partial RoPE); even.
        theta: the base.
        layout: "half" pairs dimensions (j, j + rotary_dim / 2), as in Llama; "interleaved" (2j, 2j + 1), as in GPT-J.

    >>> x = torch.randn(1, 2, 3, 8)
    >>> torch.equal(Rope(8).rotate(x, torch.zeros(1, 3, dtype=torch.long)), x)
    True
    """

    def __init__(
        self, rotary_dim: int, theta: float = 10000.0, layout: Literal["half", "interleaved"] = "half"
    ) -> None:
        super().__init__()
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"rotary_dim={rotary_dim}: RoPE turns pairs of dimensions, so give an even number")
        if layout not in ("half", "interleaved"):
            raise ValueError(f"layout={layout!r}: RoPE is 'half' or 'interleaved'")
        self.rotary_dim, self.theta, self.layout = rotary_dim, theta, layout

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        n = self.rotary_dim
        if n > x.shape[-1]:
            raise ValueError(f"rotary_dim={n} is more than the {x.shape[-1]} dimensions of a head")
        # worked out in fp32 from integers each time: nothing to lose to a cast of the module
        frequency = self.theta ** (-torch.arange(0, n, 2, device=x.device, dtype=torch.float32) / n)
        angle = positions[:, None, :, None].float() * frequency
        cos, sin = angle.cos(), angle.sin()
        turning, rest = x[..., :n].float(), x[..., n:]
        a, b = turning.chunk(2, -1) if self.layout == "half" else (turning[..., ::2], turning[..., 1::2])
        a, b = a * cos - b * sin, a * sin + b * cos
        turned = torch.cat([a, b], -1) if self.layout == "half" else torch.stack([a, b], -1).flatten(-2)
        return torch.cat([turned.to(x.dtype), rest], dim=-1)


def alibi_slopes(num_heads: int) -> list[float]:
    """The slopes of Press et al. 2021 (arXiv 2108.12409): 2 ** (-8h / n), and every other one of the next power of two.

    >>> alibi_slopes(2), alibi_slopes(3)[2]
    ([0.0625, 0.00390625], 0.25)
    """
    n = max(d for d in divisors(2 ** int(math.log2(num_heads))) if d <= num_heads)
    slopes = [2.0 ** (-8 * h / n) for h in range(1, n + 1)]
    return slopes + [2.0 ** (-4 * h / n) for h in range(1, 2 * (num_heads - n) + 1, 2)]


class Alibi(NoPosition):
    """Scores fall by slope * distance; the slopes belong to the query heads, whatever the number of KV heads."""

    def __init__(self, num_heads: int, causal: bool = True) -> None:
        super().__init__()
        self.slopes, self.causal = alibi_slopes(num_heads), causal

    def bias(self, q_positions: Tensor, k_positions: Tensor, exact: bool = True) -> Tensor:
        slopes = torch.tensor(self.slopes, device=k_positions.device)[:, None, None]
        if self.causal and not exact:  # then one row serves all queries
            return (slopes * (k_positions - q_positions[-1:]))[None]
        return (-slopes * (q_positions[:, None] - k_positions).abs())[None]


class RelativeBias(NoPosition):
    """T5's learned bias of a head and a bucket of distances (Raffel et al. 2020, arXiv 1910.10683, section 2.1).

    Half of the buckets (of each direction, if bidirectional) are single distances, the others grow logarithmically up
    to ``max_distance``. T5 shares one such module between its layers.
    """

    def __init__(
        self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
    ) -> None:
        super().__init__()
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.zeros(num_buckets, num_heads))

    def bucket(self, distance: Tensor) -> Tensor:
        """Integers [...], key position minus query position -> [...], below ``num_buckets``."""
        buckets, first = self.num_buckets, torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            first = (distance > 0) * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        scale = (buckets - exact) / math.log(self.max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
        return first + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))

    def bias(self, q_positions: Tensor, k_positions: Tensor, exact: bool = True) -> Tensor:
        buckets = self.bucket(k_positions[None, :] - q_positions[:, None])
        return self.weight[buckets].permute(2, 0, 1)[None]
