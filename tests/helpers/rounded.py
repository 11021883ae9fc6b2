"""What 8 bits leave of numbers, by the grid of the codes written out; and a plain cache that rounds to it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache


def neighbours(states: torch.Tensor, codes: str) -> tuple[torch.Tensor, ...]:
    """The codes below and above each number [..., D], and it, in units of the row's scale [..., 1]; and that."""
    bits = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)
    grid = bits[1:].float() if codes == "int8" else bits.view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].unique()
    scale = states.abs().amax(-1, keepdim=True) / grid.max()
    x = states / torch.where(scale == 0, 1.0, scale)
    above = torch.bucketize(x.contiguous(), grid).clamp(1, len(grid) - 1)
    return grid[above - 1], grid[above], x, scale


def rounded(states: torch.Tensor, codes: str) -> torch.Tensor:
    low, high, x, scale = neighbours(states, codes)
    return torch.where(x - low < high - x, low, high) * scale


def decided(states: torch.Tensor, codes: str) -> torch.Tensor:
    """States none of which lies in the middle between two codes, where a rounding error decides."""
    low, high, x, scale = neighbours(states, codes)
    middle = ((x - low) / (high - low) - 0.5).abs() < 1e-3
    return torch.where(middle, low * scale, states)


class RoundedCache(DynamicCache):
    """A ``DynamicCache`` that is given rounded states; the first call attends to the exact ones."""

    def __init__(self, kind: str, config: Any) -> None:
        super().__init__(config=config)
        self.kind = kind

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        first = self.get_seq_length(layer_idx) == 0
        new = rounded(key_states, "int8"), rounded(value_states, self.kind)  # of keys, fp8 loses too much
        out = super().update(*new, layer_idx, *args, **kwargs)
        return (key_states, value_states) if first else out
