"""What the kernels of attention with an additive bias share: their tiles, and who sees whom in one.

Query ``i`` sees key ``j`` where ``-left <= j - i - shift <= right``, ``first[b] <= j < end[b]`` and the mask says so.
Most tiles are whole: all their queries see all their keys. They are gone through first, without a comparison or a
masked load; those at the borders follow. Rows behind the last query repeat it, and have no weight, so that nothing
asks for them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from .decode_line import LOG2E

#: never specialized: a new length compiles nothing
LENGTHS = [
    "B", "HQ", "G", "Sq", "Sk", "shift", "left", "right", "rows", "heads", "a_b", "a_h", "a_i", "m_b", "m_h", "m_i",
    "scale", "plain_scale", "dropped",
]  # fmt: skip


@triton.jit
def keys_of(b, First, End, Sk, BOUNDED: tl.constexpr):
    """First and last + 1 key of row ``b``."""
    lo = 0
    hi = Sk
    if BOUNDED:
        lo = tl.load(First + b)
        hi = tl.minimum(tl.load(End + b), Sk)
    return lo, hi


@triton.jit
def tiles_of_keys(
    i0, lo, hi, shift, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """The tiles that BLOCK_M queries look at: the first key and how many; and of them the whole ones, alike."""
    start = tl.maximum(lo, i0 + shift - left) // BLOCK_N * BLOCK_N
    stop = tl.minimum(hi, i0 + BLOCK_M + shift + right)
    count = tl.maximum(stop - start + BLOCK_N - 1, 0) // BLOCK_N
    inner = (tl.maximum(lo, i0 + BLOCK_M - 1 + shift - left) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    inner_stop = tl.maximum(tl.minimum(hi, i0 + shift + right + 1), 0) // BLOCK_N * BLOCK_N
    inners = tl.maximum(inner_stop - inner, 0) // BLOCK_N
    if MASK:
        inners = 0
    return start, count, inner, inners


@triton.jit
def tiles_of_queries(
    j0, lo, hi, shift, left, right, Sq, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """The tiles of queries that look at BLOCK_N keys: the first query and how many; and of them the whole ones."""
    start = tl.maximum(0, j0 - shift - right) // BLOCK_M * BLOCK_M
    stop = tl.minimum(Sq, j0 + BLOCK_N - shift + left)
    count = tl.maximum(stop - start + BLOCK_M - 1, 0) // BLOCK_M
    if (j0 + BLOCK_N <= lo) | (j0 >= hi):
        count = 0
    inner = (tl.maximum(0, j0 + BLOCK_N - 1 - shift - right) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    inner_stop = tl.minimum(Sq, tl.maximum(0, j0 - shift + left + 1)) // BLOCK_M * BLOCK_M
    inners = tl.maximum(inner_stop - inner, 0) // BLOCK_M
    if (j0 < lo) | (j0 + BLOCK_N > hi):
        inners = 0
    if MASK:
        inners = 0
    return start, count, inner, inners


@triton.jit
def tile_seen(i0, j0, shift, left, right, Sq, Sk, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the sides hide all of a tile; and whether they show all of it, and it ends before the lengths do."""
    none = (j0 > i0 + BLOCK_M - 1 + shift + right) | (j0 + BLOCK_N - 1 < i0 + shift - left)
    seen = (j0 >= i0 + BLOCK_M - 1 + shift - left) & (j0 + BLOCK_N - 1 <= i0 + shift + right)
    return none, seen & (j0 + BLOCK_N <= Sk) & (i0 + BLOCK_M <= Sq)


@triton.jit
def place(t, start, inner, inners, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Where the ``t``-th whole tile begins; or the ``t``-th of the others."""
    if EDGE:
        at = start + t * BLOCK
        return tl.where(at >= inner, at + inners * BLOCK, at)
    else:
        return inner + t * BLOCK


@triton.jit
def rows_of(base, start, offs, stride, cols, count, WIDTH: tl.constexpr, EDGE: tl.constexpr):
    """A tile of ``cols`` consecutive numbers of each row; zeros beyond WIDTH columns, and at an EDGE beyond ``count``
    rows."""
    at = start + offs
    rows = base + at.to(tl.int64)[:, None] * stride + cols[None, :]
    if EDGE:
        return tl.load(rows, mask=(at < count)[:, None] & (cols < WIDTH)[None, :], other=0.0)
    elif cols.shape[0] == WIDTH:
        return tl.load(rows)
    else:
        return tl.load(rows, mask=(cols < WIDTH)[None, :], other=0.0)


@triton.jit
def of_row(base, i, count, other, EDGE: tl.constexpr):
    """A number of each row; at an EDGE ``other`` beyond ``count`` rows."""
    if EDGE:
        return tl.load(base + i, mask=i < count, other=other)
    else:
        return tl.load(base + i)


@triton.jit
def tile_of(base, i, j, s_i, s_j, Sq, Sk, EDGE: tl.constexpr):
    """[M, N] of a matrix with a row a query; the last row again behind it, zeros beyond the keys."""
    at = base + tl.minimum(i, Sq - 1).to(tl.int64)[:, None] * s_i + (j.to(tl.int64) * s_j)[None, :]
    if EDGE:
        return tl.load(at, mask=(j < Sk)[None, :], other=0)
    else:
        return tl.load(at)


@triton.jit
def scores_of(
    product, added, i, j, Mask, m_i, m_j, Sq, Sk, lo, hi, shift, left, right, scale, less,
    MASK: tl.constexpr, BANDED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Products of queries and keys [M, N] as scores in base 2, less what is given; -inf where a query may not look."""
    s = product * scale + (added.to(tl.float32) * LOG2E - less)
    if EDGE:
        seen = ((j >= lo) & (j < hi))[None, :]
        if BANDED:
            off = (j - shift)[None, :] - i[:, None]
            seen = seen & (off <= right) & (off >= -left)
        if MASK:
            seen = seen & (tile_of(Mask, i, j, m_i, m_j, Sq, Sk, EDGE) != 0)
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def kept(Seed, bh, i, j, Sk, dropped):
    """Which weights [M, N] dropout leaves: the same in every kernel. A head has a seed of its own."""
    return tl.rand(tl.load(Seed) + bh, i[:, None] * Sk + j[None, :]) >= dropped
