"""The line of tiles that the workers of the decode kernels share (see ``decode_kernel.py``), as device functions."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def key_range(First, End, b, ok, Sq, Sk, window, HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr, WINDOW: tl.constexpr):
    """Keys [lo, hi) that some query of batch row ``b`` (a number or a vector) may see."""
    hi = b * 0 + Sk
    if HAS_END:
        hi = tl.minimum(tl.load(End + b, mask=ok, other=0).to(tl.int32), Sk)
    lo = b * 0
    if HAS_FIRST:
        lo = tl.maximum(tl.load(First + b, mask=ok, other=0).to(tl.int32), 0)
    if WINDOW:
        lo = tl.maximum(lo, hi - Sq - window + 1)
    return lo, hi


@triton.jit
def tiles_of(lo, hi, BLOCK_N: tl.constexpr):
    return (tl.maximum(hi - lo, 0) + BLOCK_N - 1) // BLOCK_N


@triton.jit
def line_of(
    First, End, B, HKV, Sq, Sk, window, least, workers,
    HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The line of tiles: each row's tiles per KV head, tiles up to its end; a worker's tiles, workers with one more.

    No more workers take part than have ``least`` tiles each, but for rounding.
    """
    rows = tl.arange(0, BLOCK_B)
    lo, hi = key_range(First, End, rows, rows < B, Sq, Sk, window, HAS_FIRST, HAS_END, WINDOW)
    n = tl.where(rows < B, tiles_of(lo, hi, BLOCK_N), 0)
    if HAS_FIRST or HAS_END:
        upto = tl.cumsum(n, 0) * HKV
        total = tl.sum(n, 0) * HKV
    else:
        upto = tl.minimum(rows + 1, B) * n * HKV
        total = tl.max(upto, 0)
    active = tl.maximum(tl.minimum(workers, (total + least - 1) // least), 1)
    return n, upto, total // active, total % active


@triton.jit
def first_tile(worker, share, more):
    """Where a worker begins on the line; the first ``more`` workers have ``share + 1`` tiles, the others ``share``."""
    return worker * share + tl.minimum(worker, more)


@triton.jit
def worker_of(tile, share, more):
    """Who has a tile of the line."""
    wide = more * (share + 1)
    return tl.where(tile < wide, tile // (share + 1), more + (tile - wide) // tl.maximum(share, 1))


@triton.jit
def lse_offset(workers, G, Sq, DV: tl.constexpr):
    """In ``Part``, [2 * workers, G * Sq, DV] results come first, then their [2 * workers, G * Sq] log-sum-exps."""
    return workers.to(tl.int64) * (2 * G * Sq * DV)
