"""A long sequence behind a short window, one block of queries after another: S * (window + block) work, not S * S."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_patch.attn.banded import band
from hf_attn_patch.attn.visibility import Full, Visibility

#: shorter sequences are done at once
LEAST = 1024
#: fewer queries in a block are not worth a call
SHORTEST = 256


class Blocks(NamedTuple):
    """Blocks of so many queries; each query sees ``left`` and ``right`` keys around its own position."""

    queries: int
    left: int
    right: int


def blocks_of(seen: Visibility) -> Blocks | None:
    """The blocks, or None where they would save nothing: no window, or one nearly as long as the sequence."""
    if not isinstance(seen, Full) or not LEAST <= seen.q_len <= seen.keys:
        return None
    left, right = seen.sides
    if left is None or right is None:
        return None
    queries = max(SHORTEST, left + right)
    return Blocks(queries, left, right) if 4 * (queries + left + right) <= seen.keys else None


def in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """q [B, HQ, Sq, D], k [B, HKV, Sk, D], v [B, HKV, Sk, Dv] -> [B, HQ, Sq, Dv].

    Args:
        kernel: (q, k, v, mask) of a block -> its output; mask is bool [1, 1, queries, keys].
    """
    Sq, Sk = q.shape[2], k.shape[2]
    size, left, right = blocks
    parts, masks = [], dict[tuple[int, int, int], Tensor]()
    for begin in range(0, Sq, size):
        end = min(begin + size, Sq)
        at = begin + Sk - Sq  # the key at which the block's first query sits
        first, last = max(0, at - left), min(Sk, at + end - begin + right)
        shape = (end - begin, last - first, at - first)
        if shape not in masks:  # all blocks but the outer ones have the same
            rows = torch.arange(shape[0], device=q.device)[:, None] + shape[2]
            columns = torch.arange(shape[1], device=q.device)[None, :]
            masks[shape] = band(rows, columns, (left, right))[None, None]
        parts.append(kernel(q[:, :, begin:end], k[:, :, first:last], v[:, :, first:last], masks[shape]))
    return torch.cat(parts, 2)
