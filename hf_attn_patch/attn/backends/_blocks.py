"""A long sequence behind a short window, one block of queries after another: S * (window + block) work, not S * S."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_attn_patch.attn.visibility import FULL, Layout, band

#: shorter sequences are done at once
LEAST = 1024
#: fewer queries in a block are not worth a call
SHORTEST = 256


def block_of(layout: Layout) -> int | None:
    """Queries of a block, or None where blocks would save nothing: no window, or one nearly as long as the sequence."""
    left, right = layout.window
    if layout.kind != FULL or left is None or not (layout.causal or right is not None):
        return None
    if not LEAST <= layout.q_len <= layout.keys:
        return None
    reach = left + (0 if layout.causal else right or 0)
    block = max(SHORTEST, reach)
    return block if 4 * (block + reach) <= layout.keys else None


def in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    block: int,
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """q [B, HQ, Sq, D], k [B, HKV, Sk, D], v [B, HKV, Sk, Dv] -> [B, HQ, Sq, Dv].

    Args:
        kernel: (q, k, v, mask) of a block -> its output; mask is bool [1, 1, queries, keys].
    """
    Sq, Sk = q.shape[2], k.shape[2]
    left, right = layout.window
    right = 0 if layout.causal else right or 0
    assert left is not None
    parts, masks = [], dict[tuple[int, int, int], Tensor]()
    for begin in range(0, Sq, block):
        end = min(begin + block, Sq)
        at = begin + Sk - Sq  # the key at which the block's first query sits
        first, last = max(0, at - left), min(Sk, at + end - begin + right)
        shape = (end - begin, last - first, at - first)
        if shape not in masks:  # all blocks but the outer ones have the same
            rows = torch.arange(shape[0], device=q.device)[:, None] + shape[2]
            columns = torch.arange(shape[1], device=q.device)[None, :]
            masks[shape] = band(rows, columns, layout.causal, layout.window)[None, None]
        parts.append(kernel(q[:, :, begin:end], k[:, :, first:last], v[:, :, first:last], masks[shape]))
    return torch.cat(parts, 2)
