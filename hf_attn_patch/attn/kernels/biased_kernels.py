"""The Triton kernels of attention with an additive bias: forward, and backward with the gradient of the bias.

FlashAttention-2's order of work (arXiv 2307.08691): a program owns a block of queries (forward, dQ) or of keys (dK and
dV, of all query heads that share them, so that a group's gradients are added up in fp32). The gradient of a bias that
rows or heads share is the sum of ``dS`` over them; a program of its own owns each block of it and goes over rows and
heads. Nothing is added up atomically, so results repeat bit by bit.

Scores are kept in base 2: exp2 is what the hardware has. A query that sees no key has an lse of +inf: all its weights
are exp2(-inf) = 0 then. Programs of one block and head follow one another over the rows of the batch, which most often
share a bias: it is read from memory once. Strides of the bias between its rows come in UNITs, so that the compiler
knows how they are aligned.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from .biased_tiles import (
    LENGTHS,
    kept,
    keys_of,
    of_row,
    place,
    rows_of,
    scores_of,
    tile_of,
    tile_seen,
    tiles_of_keys,
    tiles_of_queries,
)


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    Q, K, V, Bias, Mask, First, End, Seed, Out, Lse,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, a_b, a_h, a_i, a_j, m_b, m_h, m_i, m_j, o_b, o_h, o_s,
    B, HQ, G, Sq, Sk, shift, left, right, scale, dropped,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr, BANDED: tl.constexpr, BOUNDED: tl.constexpr,
    EIGHTS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries over the keys that they see. Lse: fp32 [B * HQ, Sq], base 2."""
    b = (tl.program_id(0) % B).to(tl.int64)
    i0 = tl.program_id(0) // B * BLOCK_M
    h = tl.program_id(1)
    kv = h // G
    bh = b * HQ + h
    Sk = Sk // 8 * 8 if EIGHTS else Sk  # the compiler learns of it
    om, on = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    cols, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    lo, hi = keys_of(b, First, End, Sk, BOUNDED)
    Bias += (b * a_b + h * a_h) * UNIT
    Mask += b * m_b + h * m_h
    q = rows_of(Q + b * q_b + h * q_h, i0, om, q_s, cols, Sq, D, True)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    start, count, inner, inners = tiles_of_keys(i0, lo, hi, shift, left, right, BLOCK_M, BLOCK_N, MASK)
    for EDGE in tl.static_range(2):
        for t in range(count - inners if EDGE else inners):
            j0 = place(t, start, inner, inners, BLOCK_N, EDGE)
            k = rows_of(K + b * k_b + kv * k_h, j0, on, k_s, cols, Sk, D, EDGE)
            v = rows_of(V + b * v_b + kv * v_h, j0, on, v_s, cols_v, Sk, DV, EDGE)
            added = tile_of(Bias, i0 + om, j0 + on, a_i * UNIT, a_j, Sq, Sk, EDGE)
            s = scores_of(
                tl.dot(q, tl.trans(k), input_precision=PRECISION), added, i0 + om, j0 + on, Mask, m_i, m_j, Sq, Sk,
                lo, hi, shift, left, right, scale, 0.0, MASK, BANDED, EDGE,
            )  # fmt: skip
            new = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is NaN
            p = tl.exp2(s - base[:, None])
            less = tl.exp2(top - base)
            total = total * less + tl.sum(p, 1)
            if DROPOUT:
                p = tl.where(kept(Seed, bh, i0 + om, j0 + on, Sk, dropped), p / (1.0 - dropped), 0.0)
            acc = acc * less[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            top = new
    blind = total == 0.0
    out = acc / tl.where(blind, 1.0, total)[:, None]
    rows = i0 + om < Sq
    at = Out + b * o_b + h * o_h + (i0 + om).to(tl.int64)[:, None] * o_s + cols_v[None, :]
    tl.store(at, out.to(Out.dtype.element_ty), mask=rows[:, None] & (cols_v < DV)[None, :])
    lse = tl.where(blind, float("inf"), top + tl.log2(tl.where(blind, 1.0, total)))
    tl.store(Lse + bh * Sq + i0 + om, lse, mask=rows)


@triton.jit(do_not_specialize=LENGTHS)
def queries_kernel(
    Q, K, V, Bias, Mask, First, End, Seed, Out, Grad, Lse, Delta, GQ, GBias,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, a_b, a_h, a_i, a_j, m_b, m_h, m_i, m_j, o_b, o_h, o_s, g_b, g_h, g_s,
    rows, heads, B, HQ, G, Sq, Sk, shift, left, right, scale, plain_scale, dropped,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr, BANDED: tl.constexpr, BOUNDED: tl.constexpr,
    EIGHTS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """dQ ([B, HQ, Sq, D] contiguous) of a block of queries, and Delta, each query's sum of out * grad, fp32
    [B * HQ, Sq], for the kernels that follow. ALONE: nothing shares the bias, and its gradient ([B, HQ, Sq, Sk]
    contiguous, zero where this kernel does not come) is written too."""
    b = (tl.program_id(0) % B).to(tl.int64)
    i0 = tl.program_id(0) // B * BLOCK_M
    h = tl.program_id(1)
    kv = h // G
    at_row = (b * HQ + h) * Sq + i0
    Sk = Sk // 8 * 8 if EIGHTS else Sk  # the compiler learns of it
    om, on = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    cols, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    lo, hi = keys_of(b, First, End, Sk, BOUNDED)
    Bias += (b * a_b + h * a_h) * UNIT
    Mask += b * m_b + h * m_h
    q = rows_of(Q + b * q_b + h * q_h, i0, om, q_s, cols, Sq, D, True)
    grad = rows_of(Grad + b * g_b + h * g_h, i0, om, g_s, cols_v, Sq, DV, True)
    out = rows_of(Out + b * o_b + h * o_h, i0, om, o_s, cols_v, Sq, DV, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(Delta + at_row + om, delta, mask=i0 + om < Sq)
    lse = tl.load(Lse + at_row + om, mask=i0 + om < Sq, other=float("inf"))
    gq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start, count, inner, inners = tiles_of_keys(i0, lo, hi, shift, left, right, BLOCK_M, BLOCK_N, MASK)
    for EDGE in tl.static_range(2):
        for t in range(count - inners if EDGE else inners):
            j0 = place(t, start, inner, inners, BLOCK_N, EDGE)
            k = rows_of(K + b * k_b + kv * k_h, j0, on, k_s, cols, Sk, D, EDGE)
            v = rows_of(V + b * v_b + kv * v_h, j0, on, v_s, cols_v, Sk, DV, EDGE)
            added = tile_of(Bias, i0 + om, j0 + on, a_i * UNIT, a_j, Sq, Sk, EDGE)
            s = scores_of(
                tl.dot(q, tl.trans(k), input_precision=PRECISION), added, i0 + om, j0 + on, Mask, m_i, m_j, Sq, Sk,
                lo, hi, shift, left, right, scale, lse[:, None], MASK, BANDED, EDGE,
            )  # fmt: skip
            gp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                gp = tl.where(kept(Seed, b * HQ + h, i0 + om, j0 + on, Sk, dropped), gp / (1.0 - dropped), 0.0)
            gs = tl.exp2(s) * (gp - delta[:, None])
            if ALONE:
                at = GBias + (at_row + om)[:, None] * Sk + (j0 + on)[None, :]
                inside = (i0 + om < Sq)[:, None] & (j0 + on < Sk)[None, :]
                tl.store(at, gs.to(GBias.dtype.element_ty), mask=inside)
            gq += tl.dot(gs.to(k.dtype), k, input_precision=PRECISION)
    at = GQ + (at_row + om)[:, None] * D + cols[None, :]
    tl.store(at, (gq * plain_scale).to(GQ.dtype.element_ty), mask=(i0 + om < Sq)[:, None] & (cols < D)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def keys_kernel(
    Q, K, V, Bias, Mask, First, End, Seed, Grad, Lse, Delta, GK, GV,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, a_b, a_h, a_i, a_j, m_b, m_h, m_i, m_j, g_b, g_h, g_s,
    rows, heads, B, HQ, G, Sq, Sk, shift, left, right, scale, plain_scale, dropped,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr, BANDED: tl.constexpr, BOUNDED: tl.constexpr,
    EIGHTS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV ([B, HKV, Sk, D] contiguous) of a block of keys, over all queries of their group."""
    b = (tl.program_id(0) % B).to(tl.int64)
    j0 = tl.program_id(0) // B * BLOCK_N
    kv = tl.program_id(1)
    Sk = Sk // 8 * 8 if EIGHTS else Sk  # the compiler learns of it
    om, on = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    cols, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    lo, hi = keys_of(b, First, End, Sk, BOUNDED)
    k = rows_of(K + b * k_b + kv * k_h, j0, on, k_s, cols, Sk, D, True)
    v = rows_of(V + b * v_b + kv * v_h, j0, on, v_s, cols_v, Sk, DV, True)
    gk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    gv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    start, count, inner, inners = tiles_of_queries(j0, lo, hi, shift, left, right, Sq, BLOCK_M, BLOCK_N, MASK)
    for g in range(G):
        h = kv * G + g
        bh = b * HQ + h
        for EDGE in tl.static_range(2):
            for t in range(count - inners if EDGE else inners):
                i0 = place(t, start, inner, inners, BLOCK_M, EDGE)
                q = rows_of(Q + b * q_b + h * q_h, i0, om, q_s, cols, Sq, D, EDGE)
                grad = rows_of(Grad + b * g_b + h * g_h, i0, om, g_s, cols_v, Sq, DV, EDGE)
                of_head = Bias + (b * a_b + h * a_h) * UNIT
                added = tile_of(of_head, i0 + om, j0 + on, a_i * UNIT, a_j, Sq, Sk, EDGE)
                lse = of_row(Lse + bh * Sq, i0 + om, Sq, float("inf"), EDGE)
                delta = of_row(Delta + bh * Sq, i0 + om, Sq, 0.0, EDGE)
                s = scores_of(
                    tl.dot(q, tl.trans(k), input_precision=PRECISION), added, i0 + om, j0 + on,
                    Mask + b * m_b + h * m_h, m_i, m_j, Sq, Sk, lo, hi, shift, left, right, scale, lse[:, None],
                    MASK, BANDED, EDGE,
                )  # fmt: skip
                p = tl.exp2(s)
                gp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                left_p = p
                if DROPOUT:
                    keep = kept(Seed, bh, i0 + om, j0 + on, Sk, dropped)
                    left_p = tl.where(keep, p / (1.0 - dropped), 0.0)
                    gp = tl.where(keep, gp / (1.0 - dropped), 0.0)
                gv += tl.dot(tl.trans(left_p.to(grad.dtype)), grad, input_precision=PRECISION)
                gs = p * (gp - delta[:, None])
                gk += tl.dot(tl.trans(gs.to(q.dtype)), q, input_precision=PRECISION)
    keys = j0 + on < Sk
    at = (b * (HQ // G) + kv) * Sk + j0
    to_k = GK + at * D + on[:, None] * D + cols[None, :]
    tl.store(to_k, (gk * plain_scale).to(GK.dtype.element_ty), mask=keys[:, None] & (cols < D)[None, :])
    to_v = GV + at * DV + on[:, None] * DV + cols_v[None, :]
    tl.store(to_v, gv.to(GV.dtype.element_ty), mask=keys[:, None] & (cols_v < DV)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def bias_kernel(
    Q, K, V, Bias, Mask, First, End, Seed, Grad, Lse, Delta, GBias,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, a_b, a_h, a_i, a_j, m_b, m_h, m_i, m_j, g_b, g_h, g_s,
    rows, heads, B, HQ, G, Sq, Sk, shift, left, right, scale, plain_scale, dropped,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr, BANDED: tl.constexpr, BOUNDED: tl.constexpr,
    EIGHTS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of the gradient ([B / rows, HQ / heads, Sq, Sk] contiguous) of a bias that ``rows`` rows and ``heads``
    heads share."""
    blocks = tl.cdiv(Sq, BLOCK_M)
    i0 = tl.program_id(0) % blocks * BLOCK_M
    j0 = tl.program_id(0) // blocks * BLOCK_N
    b0 = tl.program_id(1) // (HQ // heads) * rows
    h0 = tl.program_id(1) % (HQ // heads) * heads
    Sk = Sk // 8 * 8 if EIGHTS else Sk  # the compiler learns of it
    om, on = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    cols, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    Bias += (b0.to(tl.int64) * a_b + h0 * a_h) * UNIT
    added = tile_of(Bias, i0 + om, j0 + on, a_i * UNIT, a_j, Sq, Sk, True)  # the one that they share
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    none, all_seen = tile_seen(i0, j0, shift, left, right, Sq, Sk, BLOCK_M, BLOCK_N)
    count = 0 if none else rows * heads
    whole = count if all_seen else 0
    if MASK or BOUNDED:
        whole = 0
    for EDGE in tl.static_range(2):
        for n in range(whole if EDGE else 0, count if EDGE else whole):
            b = (b0 + n // heads).to(tl.int64)
            h = h0 + n % heads
            bh = b * HQ + h
            kv = h // G
            lo, hi = keys_of(b, First, End, Sk, BOUNDED)
            q = rows_of(Q + b * q_b + h * q_h, i0, om, q_s, cols, Sq, D, EDGE)
            k = rows_of(K + b * k_b + kv * k_h, j0, on, k_s, cols, Sk, D, EDGE)
            grad = rows_of(Grad + b * g_b + h * g_h, i0, om, g_s, cols_v, Sq, DV, EDGE)
            v = rows_of(V + b * v_b + kv * v_h, j0, on, v_s, cols_v, Sk, DV, EDGE)
            lse = of_row(Lse + bh * Sq, i0 + om, Sq, float("inf"), EDGE)
            delta = of_row(Delta + bh * Sq, i0 + om, Sq, 0.0, EDGE)
            s = scores_of(
                tl.dot(q, tl.trans(k), input_precision=PRECISION), added, i0 + om, j0 + on,
                Mask + b * m_b + h * m_h, m_i, m_j, Sq, Sk, lo, hi, shift, left, right, scale, lse[:, None],
                MASK, BANDED, EDGE,
            )  # fmt: skip
            gp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                gp = tl.where(kept(Seed, bh, i0 + om, j0 + on, Sk, dropped), gp / (1.0 - dropped), 0.0)
            total += tl.exp2(s) * (gp - delta[:, None])
    at = GBias + (tl.program_id(1).to(tl.int64) * Sq + i0 + om)[:, None] * Sk + (j0 + on)[None, :]
    inside = (i0 + om < Sq)[:, None] & (j0 + on < Sk)[None, :]
    tl.store(at, total.to(GBias.dtype.element_ty), mask=inside)
