"""The Triton kernels of attention with an additive bias: forward, and backward with the gradient of the bias.

FlashAttention-2's order of work (arXiv 2307.08691): a program owns a block of queries (forward, dQ) or of keys (dK and
dV, of all query heads that share them, so that a group's gradients are added up in fp32). The gradient of a bias that
rows or heads share is the sum of ``dS`` over them; a program of its own owns each block of it and goes over rows and
heads. Nothing is added up atomically, so results repeat bit by bit.

Query ``i`` sees key ``j`` where ``-left <= j - i - shift <= right``, ``first[b] <= j < end[b]`` and the mask says so.
Scores are kept in base 2: exp2 is what the hardware has. A query that sees no key has an lse of +inf: all its weights
are exp2(-inf) = 0 then.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from .decode_line import LOG2E

#: never specialized: a new length compiles nothing
LENGTHS = ["HQ", "G", "Sq", "Sk", "shift", "left", "right", "rows", "heads"]


@triton.jit
def _finish(
    product, at_i, at_j, Bias, Mask, a_i, a_j, m_i, m_j, i0, j0, Sq, Sk, lo, hi, shift, left, right, scale,
    MASK: tl.constexpr,
):  # fmt: skip
    """Products of queries and keys as scores in base 2, -inf where a query may not look.

    ``at_i`` and ``at_j`` are offsets from ``i0`` and ``j0``, shaped so that they broadcast to the tile's shape.
    """
    i, j = i0 + at_i, j0 + at_j
    inside = (i < Sq) & (j < Sk)
    i64, j64 = i.to(tl.int64), j.to(tl.int64)
    added = tl.load(Bias + i64 * a_i + j64 * a_j, mask=inside, other=0.0).to(tl.float32)
    off = j - i - shift
    seen = inside & (off <= right) & (off >= -left) & (j >= lo) & (j < hi)
    if MASK:
        seen = seen & (tl.load(Mask + i64 * m_i + j64 * m_j, mask=inside, other=0) != 0)
    return tl.where(seen, product * scale + added * LOG2E, float("-inf"))


@triton.jit
def _kept(Seed, bh, i, j, Sk, dropped):
    """Which weights dropout leaves: the same in every kernel. A head has a seed of its own."""
    return tl.rand(tl.load(Seed) + bh, i * Sk + j) >= dropped


@triton.jit
def _keys_of(b, First, End, Sk, BOUNDED: tl.constexpr):
    """First and last + 1 key of row ``b``."""
    lo = 0
    hi = Sk
    if BOUNDED:
        lo = tl.load(First + b)
        hi = tl.load(End + b)
    return lo, hi


@triton.jit
def _rows(base, start, offs, stride, cols, count, width):
    """A tile of ``cols`` consecutive numbers of each row; zeros beyond ``count`` rows and ``width`` columns."""
    at = start + offs
    rows = base + at.to(tl.int64)[:, None] * stride + cols[None, :]
    return tl.load(rows, mask=(at < count)[:, None] & (cols < width)[None, :], other=0.0)


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    Q, K, V, Bias, Mask, First, End, Seed, Out, Lse,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, a_b, a_h, a_i, a_j, m_b, m_h, m_i, m_j, o_b, o_h, o_s,
    HQ, G, Sq, Sk, shift, left, right, scale, dropped,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, BOUNDED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries over the keys that they see. Lse: fp32 [B * HQ, Sq], base 2."""
    i0 = tl.program_id(0) * BLOCK_M
    bh = tl.program_id(1)
    b = (bh // HQ).to(tl.int64)
    h = bh % HQ
    kv = h // G
    om, on = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    cols, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    lo, hi = _keys_of(b, First, End, Sk, BOUNDED)
    Bias += b * a_b + h * a_h
    Mask += b * m_b + h * m_h
    q = _rows(Q + b * q_b + h * q_h, i0, om, q_s, cols, Sq, D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    start = tl.maximum(lo, i0 + shift - left) // BLOCK_N * BLOCK_N
    for j0 in range(start, tl.minimum(hi, i0 + BLOCK_M + shift + right), BLOCK_N):
        k = _rows(K + b * k_b + kv * k_h, j0, on, k_s, cols, Sk, D)
        v = _rows(V + b * v_b + kv * v_h, j0, on, v_s, cols_v, Sk, DV)
        s = _finish(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), om[:, None], on[None, :], Bias, Mask, a_i, a_j, m_i,
            m_j, i0, j0, Sq, Sk, lo, hi, shift, left, right, scale, MASK,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is NaN
        p = tl.exp2(s - base[:, None])
        less = tl.exp2(top - base)
        total = total * less + tl.sum(p, 1)
        if DROPOUT:
            keep = _kept(Seed, bh, (i0 + om)[:, None], (j0 + on)[None, :], Sk, dropped)
            p = tl.where(keep, p / (1.0 - dropped), 0.0)
        acc = acc * less[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = new
    blind = total == 0.0
    out = acc / tl.where(blind, 1.0, total)[:, None]
    rows = i0 + om < Sq
    at = Out + b * o_b + h * o_h + i0.to(tl.int64) * o_s + om[:, None] * o_s + cols_v[None, :]
    tl.store(at, out.to(Out.dtype.element_ty), mask=rows[:, None] & (cols_v < DV)[None, :])
    lse = tl.where(blind, float("inf"), top + tl.log2(tl.where(blind, 1.0, total)))
    tl.store(Lse + bh.to(tl.int64) * Sq + i0 + om, lse, mask=rows)


@triton.jit(do_not_specialize=LENGTHS)
def delta_kernel(
    Out, Grad, Delta, o_b, o_h, o_s, g_b, g_h, g_s, HQ, Sq, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Each query's sum of out * grad, fp32 [B * HQ, Sq]."""
    i0 = tl.program_id(0) * BLOCK_M
    bh = tl.program_id(1)
    b = (bh // HQ).to(tl.int64)
    h = bh % HQ
    om, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    out = _rows(Out + b * o_b + h * o_h, i0, om, o_s, cols, Sq, DV).to(tl.float32)
    grad = _rows(Grad + b * g_b + h * g_h, i0, om, g_s, cols, Sq, DV).to(tl.float32)
    tl.store(Delta + bh.to(tl.int64) * Sq + i0 + om, tl.sum(out * grad, 1), mask=i0 + om < Sq)


@triton.jit(do_not_specialize=LENGTHS)
def keys_kernel(
    Q, K, V, Bias, Mask, First, End, Seed, Grad, Lse, Delta, GK, GV,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, a_b, a_h, a_i, a_j, m_b, m_h, m_i, m_j, g_b, g_h, g_s, rows, heads,
    HQ, G, Sq, Sk, shift, left, right, scale, plain_scale, dropped,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, BOUNDED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV ([B, HKV, Sk, D] contiguous) of a block of keys, over all queries of their group. Tiles lie [N, M]."""
    j0 = tl.program_id(0) * BLOCK_N
    b_kv = tl.program_id(1)
    HKV = HQ // G
    b = (b_kv // HKV).to(tl.int64)
    kv = b_kv % HKV
    om, on = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    cols, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    lo, hi = _keys_of(b, First, End, Sk, BOUNDED)
    k = _rows(K + b * k_b + kv * k_h, j0, on, k_s, cols, Sk, D)
    v = _rows(V + b * v_b + kv * v_h, j0, on, v_s, cols_v, Sk, DV)
    gk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    gv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    start = tl.maximum(0, j0 - shift - right) // BLOCK_M * BLOCK_M
    stop = tl.minimum(Sq, j0 + BLOCK_N - shift + left)
    if (j0 + BLOCK_N <= lo) | (j0 >= hi):
        stop = start
    for g in range(G):
        h = kv * G + g
        bh = (b * HQ + h).to(tl.int64)
        for i0 in range(start, stop, BLOCK_M):
            q = _rows(Q + b * q_b + h * q_h, i0, om, q_s, cols, Sq, D)
            grad = _rows(Grad + b * g_b + h * g_h, i0, om, g_s, cols_v, Sq, DV)
            s = _finish(
                tl.dot(k, tl.trans(q), input_precision=PRECISION), om[None, :], on[:, None], Bias + b * a_b + h * a_h,
                Mask + b * m_b + h * m_h, a_i, a_j, m_i, m_j, i0, j0, Sq, Sk, lo, hi, shift, left, right, scale, MASK,
            )  # fmt: skip
            lse = tl.load(Lse + bh * Sq + i0 + om, mask=i0 + om < Sq, other=float("inf"))
            delta = tl.load(Delta + bh * Sq + i0 + om, mask=i0 + om < Sq, other=0.0)
            p = tl.exp2(s - lse[None, :])
            gp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            left_p = p
            if DROPOUT:
                keep = _kept(Seed, bh, (i0 + om)[None, :], (j0 + on)[:, None], Sk, dropped)
                left_p = tl.where(keep, p / (1.0 - dropped), 0.0)
                gp = tl.where(keep, gp / (1.0 - dropped), 0.0)
            gv += tl.dot(left_p.to(grad.dtype), grad, input_precision=PRECISION)
            gs = p * (gp - delta[None, :])
            gk += tl.dot(gs.to(q.dtype), q, input_precision=PRECISION)
    keys = j0 + on < Sk
    at = b_kv.to(tl.int64) * Sk + j0
    to_k = GK + at * D + on[:, None] * D + cols[None, :]
    tl.store(to_k, (gk * plain_scale).to(GK.dtype.element_ty), mask=keys[:, None] & (cols < D)[None, :])
    to_v = GV + at * DV + on[:, None] * DV + cols_v[None, :]
    tl.store(to_v, gv.to(GV.dtype.element_ty), mask=keys[:, None] & (cols_v < DV)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def queries_kernel(
    Q, K, V, Bias, Mask, First, End, Seed, Grad, Lse, Delta, GQ, GBias,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, a_b, a_h, a_i, a_j, m_b, m_h, m_i, m_j, g_b, g_h, g_s, rows, heads,
    HQ, G, Sq, Sk, shift, left, right, scale, plain_scale, dropped,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, BOUNDED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WITH_BIAS: tl.constexpr,
):  # fmt: skip
    """dQ ([B, HQ, Sq, D] contiguous) of a block of queries; of a bias that nothing shares also its gradient
    ([B, HQ, Sq, Sk] contiguous, zero where this kernel does not come)."""
    i0 = tl.program_id(0) * BLOCK_M
    bh = tl.program_id(1)
    b = (bh // HQ).to(tl.int64)
    h = bh % HQ
    kv = h // G
    at_row = bh.to(tl.int64) * Sq + i0
    om, on = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    cols, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    lo, hi = _keys_of(b, First, End, Sk, BOUNDED)
    Bias += b * a_b + h * a_h
    Mask += b * m_b + h * m_h
    q = _rows(Q + b * q_b + h * q_h, i0, om, q_s, cols, Sq, D)
    grad = _rows(Grad + b * g_b + h * g_h, i0, om, g_s, cols_v, Sq, DV)
    lse = tl.load(Lse + at_row + om, mask=i0 + om < Sq, other=float("inf"))
    delta = tl.load(Delta + at_row + om, mask=i0 + om < Sq, other=0.0)
    gq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start = tl.maximum(lo, i0 + shift - left) // BLOCK_N * BLOCK_N
    for j0 in range(start, tl.minimum(hi, i0 + BLOCK_M + shift + right), BLOCK_N):
        k = _rows(K + b * k_b + kv * k_h, j0, on, k_s, cols, Sk, D)
        v = _rows(V + b * v_b + kv * v_h, j0, on, v_s, cols_v, Sk, DV)
        s = _finish(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), om[:, None], on[None, :], Bias, Mask, a_i, a_j, m_i,
            m_j, i0, j0, Sq, Sk, lo, hi, shift, left, right, scale, MASK,
        )  # fmt: skip
        gp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = _kept(Seed, bh, (i0 + om)[:, None], (j0 + on)[None, :], Sk, dropped)
            gp = tl.where(keep, gp / (1.0 - dropped), 0.0)
        gs = tl.exp2(s - lse[:, None]) * (gp - delta[:, None])
        if WITH_BIAS:
            at = GBias + at_row * Sk + j0 + om[:, None].to(tl.int64) * Sk + on[None, :]
            inside = (i0 + om < Sq)[:, None] & (j0 + on < Sk)[None, :]
            tl.store(at, gs.to(GBias.dtype.element_ty), mask=inside)
        gq += tl.dot(gs.to(k.dtype), k, input_precision=PRECISION)
    at = GQ + at_row * D + om[:, None] * D + cols[None, :]
    tl.store(at, (gq * plain_scale).to(GQ.dtype.element_ty), mask=(i0 + om < Sq)[:, None] & (cols < D)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def bias_kernel(
    Q, K, V, Bias, Mask, First, End, Seed, Grad, Lse, Delta, GBias, _,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, a_b, a_h, a_i, a_j, m_b, m_h, m_i, m_j, g_b, g_h, g_s, rows, heads,
    HQ, G, Sq, Sk, shift, left, right, scale, plain_scale, dropped,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, BOUNDED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of the gradient ([B / rows, HQ / heads, Sq, Sk] contiguous) of a bias that ``rows`` rows and ``heads``
    heads share."""
    blocks = tl.cdiv(Sq, BLOCK_M)
    i0 = tl.program_id(0) % blocks * BLOCK_M
    j0 = tl.program_id(0) // blocks * BLOCK_N
    place = tl.program_id(1)
    of_heads = HQ // heads
    om, on = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    cols, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    count = rows * heads
    if (j0 > i0 + BLOCK_M - 1 + shift + right) | (j0 + BLOCK_N - 1 < i0 + shift - left):
        count = 0
    for n in range(count):
        b = (place // of_heads * rows + n // heads).to(tl.int64)
        h = place % of_heads * heads + n % heads
        bh = b * HQ + h
        kv = h // G
        lo, hi = _keys_of(b, First, End, Sk, BOUNDED)
        q = _rows(Q + b * q_b + h * q_h, i0, om, q_s, cols, Sq, D)
        k = _rows(K + b * k_b + kv * k_h, j0, on, k_s, cols, Sk, D)
        s = _finish(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), om[:, None], on[None, :], Bias + b * a_b + h * a_h,
            Mask + b * m_b + h * m_h, a_i, a_j, m_i, m_j, i0, j0, Sq, Sk, lo, hi, shift, left, right, scale, MASK,
        )  # fmt: skip
        grad = _rows(Grad + b * g_b + h * g_h, i0, om, g_s, cols_v, Sq, DV)
        v = _rows(V + b * v_b + kv * v_h, j0, on, v_s, cols_v, Sk, DV)
        gp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = _kept(Seed, bh, (i0 + om)[:, None], (j0 + on)[None, :], Sk, dropped)
            gp = tl.where(keep, gp / (1.0 - dropped), 0.0)
        lse = tl.load(Lse + bh * Sq + i0 + om, mask=i0 + om < Sq, other=float("inf"))
        delta = tl.load(Delta + bh * Sq + i0 + om, mask=i0 + om < Sq, other=0.0)
        total += tl.exp2(s - lse[:, None]) * (gp - delta[:, None])
    at = GBias + (place.to(tl.int64) * Sq + i0) * Sk + j0 + om[:, None].to(tl.int64) * Sk + on[None, :]
    inside = (i0 + om < Sq)[:, None] & (j0 + on < Sk)[None, :]
    tl.store(at, total.to(GBias.dtype.element_ty), mask=inside)
