"""The Triton kernel of grouped decode attention: who computes what, and how.

Work is counted in tiles of BLOCK_N keys. The tiles that any query may see, of every batch row and KV head, form one
line, which is cut into as many equal ranges as there are workers. So each worker has the same number of bytes to read,
but for one tile, whatever the lengths of the rows, which live on the device (stream-K, arXiv 2301.03598). A worker's
range crosses heads: a head that lies in one worker is written at once; of the others every worker writes a partial
result, and ``combine_kernel`` merges them in a fixed order (flash-decoding), so that results repeat bit by bit.

A worker has at most two partial results: of the head that it begins with (slot 2w) and of the one that it ends with
(slot 2w + 1). Row r of a head's query tile is query head ``h * G + r // Sq`` at query position ``r % Sq``.

Scores are kept in base 2: exp2 is what the hardware has.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode_codes import for_codes, numbers, numbers_of_words
from .decode_line import LN2, LOG2E, first_tile, key_range, line_of, lse_offset, tiles_of


@triton.jit
def _tanh(x):
    # a series near 0, where 1 - exp(-2x) would cancel: a softcap multiplies the error by 50
    a = tl.abs(x)
    e = tl.exp2(a * (-2 * LOG2E))
    b = x * x
    series = a * (1.0 + b * (-1 / 3 + b * (2 / 15 + b * (-17 / 315 + b * (62 / 2835)))))
    t = tl.where(a < 0.25, series, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -t, t)


@triton.jit
def _in_band(keys, last, window, WINDOW: tl.constexpr):
    """Which of BLOCK_N keys the BLOCK_M queries see whose last key is ``last``."""
    seen = keys[None, :] <= last[:, None]
    if WINDOW:
        seen = seen & (keys[None, :] > last[:, None] - window)
    return seen


@triton.jit
def _finite_where(rows, x):
    return tl.where(rows & ~(tl.abs(x.to(tl.float32)) < float("inf")), 0.0, x).to(x.dtype)


@triton.jit(do_not_specialize=["B", "HKV", "G", "Sq", "Sk", "page", "window", "least", "workers"])
def decode_kernel(
    Q, K, V, KScale, VScale, Out, Lse, Part, First, End, Mask, Bias, Sinks, Table,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, ks_b, ks_h, vs_b, vs_h,
    m_b, m_h, m_s, m_k, a_b, a_h, a_s, a_k, t_b,
    B, HKV, G, Sq, Sk, page, window, least, workers, qk_scale, softcap_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_B: tl.constexpr, M_TILES: tl.constexpr, SPLIT: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, PAGED: tl.constexpr, CODES: tl.constexpr,
    V_CODES: tl.constexpr, DOTS: tl.constexpr, FAST: tl.constexpr, WORDS: tl.constexpr, LAZY_SUM: tl.constexpr,
    EVICT: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a query tile over a worker's tiles of keys.

    MASK and BIAS: 0 none, 1 one row of Sk for all rows of a query tile, 2 a row of Sk for each; MASK also 3: one row of
    words, whose bit i says whether query i may look.
    PAGED: 0 no, 1 a tile's keys lie on several pages, 2 on one.
    CODES, V_CODES: 0 none, else K and V are codes (``decode_codes.py``), whose products are made in DOTS; FAST: by
    assembly; WORDS: values lie in words of four.
    CAUSAL: queries differ in what they see (false for one query, whose keys end at ``hi`` anyway).
    """
    pid = tl.program_id(0)
    worker = pid // M_TILES
    m_tile = pid % M_TILES
    if PDL:  # set up while the kernel before still ran
        gdc_wait()

    if SPLIT:
        n, upto, share, more = line_of(
            First, End, B, HKV, Sq, Sk, window, least, workers, HAS_FIRST, HAS_END, WINDOW, BLOCK_N, BLOCK_B
        )
        total = tl.max(upto, 0)
        tile = first_tile(worker, share, more)
        stop = tl.minimum(first_tile(worker + 1, share, more), total)
    else:  # one worker a head, empty ones too: they have zeros to write
        tile = worker
        stop = worker + 1

    rows = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < G * Sq
    group = rows // Sq
    position = rows % Sq
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    d_ok = offs_d < D
    dv_ok = offs_dv < DV

    while tile < stop:
        if SPLIT:
            if HAS_FIRST or HAS_END:
                b = tl.sum((upto <= tile).to(tl.int32), 0)
                tiles = tl.sum(tl.where(tl.arange(0, BLOCK_B) == b, n, 0), 0)
                before = tl.max(tl.where(upto <= tile, upto, 0), 0)
            else:
                tiles = total // (B * HKV)
                b = tile // (tiles * HKV)
                before = b * tiles * HKV
            h = (tile - before) // tiles
            begin = (tile - before) % tiles
            lo, hi = key_range(First, End, b, b < B, Sq, Sk, window, HAS_FIRST, HAS_END, WINDOW)
            count = tl.minimum(stop - tile, tiles - begin)
        else:
            b = worker // HKV
            h = worker % HKV
            lo, hi = key_range(First, End, b, b < B, Sq, Sk, window, HAS_FIRST, HAS_END, WINDOW)
            tiles = tiles_of(lo, hi, BLOCK_N)
            begin = 0
            count = tiles

        b64 = b.to(tl.int64)
        head = h * G + group
        q_rows = Q + b64 * q_b + head.to(tl.int64) * q_h + position * q_s
        q = tl.load(q_rows[:, None] + offs_d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0)
        last = hi - Sq + position  # of the keys that a causal query sees
        row_scale = qk_scale
        if CODES:
            q, top = for_codes(q, DOTS)
            row_scale = (top * qk_scale)[:, None]
            k_scales = KScale + b64 * ks_b + h.to(tl.int64) * ks_h
            v_scales = VScale + b64 * vs_b + h.to(tl.int64) * vs_h
            ahead = lo + begin * BLOCK_N + offs_n
            k_scale = tl.load(k_scales + ahead, mask=ahead < hi, other=0.0).to(tl.float32)
            v_scale = tl.load(v_scales + ahead, mask=ahead < hi, other=0.0).to(tl.float32)
        if PAGED:
            k_base = K + h.to(tl.int64) * k_h
            v_base = V + h.to(tl.int64) * v_h
        else:
            k_base = K + b64 * k_b + h.to(tl.int64) * k_h
            v_base = V + b64 * v_b + h.to(tl.int64) * v_h
        if MASK == 1 or MASK == 3:
            mask_row = Mask + b64 * m_b + (h * G).to(tl.int64) * m_h
        if MASK == 3:
            bit = tl.full([BLOCK_M], 1, tl.int64) << position.to(tl.int64)
        if MASK == 2:
            mask_rows = Mask + b64 * m_b + head.to(tl.int64) * m_h + position.to(tl.int64) * m_s
        if BIAS == 1:
            bias_row = Bias + b64 * a_b + (h * G).to(tl.int64) * a_h
        if BIAS == 2:
            bias_rows = Bias + b64 * a_b + head.to(tl.int64) * a_h + position.to(tl.int64) * a_s

        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        if LAZY_SUM:
            norm = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        else:
            norm = tl.zeros([BLOCK_M], tl.float32)

        if PAGED:
            table_row = Table + b64 * t_b
            ahead = lo + begin * BLOCK_N
            if PAGED == 1:
                ahead += offs_n
            number = tl.load(table_row + ahead // page, mask=ahead < hi, other=0)
        for i in tl.range(begin, begin + count):
            start = lo + i * BLOCK_N
            keys = start + offs_n
            key_ok = keys < hi
            # A key that no row of the tile may see is not read: no bytes, and what lies there cannot leak.
            if MASK == 1:
                key_ok = key_ok & (tl.load(mask_row + keys * m_k, mask=key_ok, other=0) != 0)
            if MASK == 3:
                word = tl.load(mask_row + keys * m_k, mask=key_ok, other=0)
                key_ok = key_ok & (word != 0)
                seen = word[None, :] & bit[:, None]
            if MASK == 2:
                seen = tl.load(
                    mask_rows[:, None] + (keys * m_k)[None, :], mask=row_ok[:, None] & key_ok[None, :], other=0
                )
            if BIAS == 1:
                bias = tl.load(bias_row + keys * a_k, mask=key_ok, other=float("-inf")).to(tl.float32)
                key_ok = key_ok & (bias > float("-inf"))
                bias = bias[None, :]
            if BIAS == 2:
                bias = tl.load(
                    bias_rows[:, None] + (keys * a_k)[None, :],
                    mask=row_ok[:, None] & key_ok[None, :],
                    other=float("-inf"),
                ).to(tl.float32)
            if MASK > 1 or BIAS == 2:
                visible = key_ok[None, :]
                if MASK > 1:
                    visible = visible & (seen != 0)
                if BIAS == 2:
                    visible = visible & (bias > float("-inf"))
                if CAUSAL:
                    visible = visible & _in_band(keys, last, window, WINDOW)
            if MASK == 2 or BIAS == 2 or (MASK == 3 and CAUSAL):
                # what one row may not see for one reason, and another for another, nobody sees
                key_ok = key_ok & (tl.max(visible.to(tl.int32), 0) > 0)
            if PAGED:
                if PAGED == 1:
                    slot = keys % page
                    ahead = keys + BLOCK_N
                else:
                    slot = start % page + offs_n
                    ahead = start + BLOCK_N
                k_rows = k_base + number.to(tl.int64) * k_b + slot * k_s
                v_rows = v_base + number.to(tl.int64) * v_b + slot * v_s
                # where the next tile lies is known before this one is worked on
                number = tl.load(table_row + ahead // page, mask=ahead < hi, other=0)
            else:
                k_rows = k_base + start.to(tl.int64) * k_s + offs_n * k_s
                v_rows = v_base + start.to(tl.int64) * v_s + offs_n * v_s

            if D == BLOCK_D:
                k = tl.load(k_rows[:, None] + offs_d[None, :], mask=key_ok[:, None], other=0.0, eviction_policy=EVICT)
            else:
                k_mask = key_ok[:, None] & d_ok[None, :]
                k = tl.load(k_rows[:, None] + offs_d[None, :], mask=k_mask, other=0.0, eviction_policy=EVICT)
            if CODES:
                k = numbers(k, CODES, DOTS, FAST)
            if BIAS:
                # under the lowest number a key counts only where its row has no other: what is finite stays
                low = bias <= (-32752.0 if Bias.dtype.element_ty == tl.float16 else -1.69e38)
                if MASK > 1 or BIAS == 2:
                    low = low | (visible == 0)
                low = tl.min(low.to(tl.int32), 0) > 0
                if CODES:
                    k_scale, v_scale = _finite_where(low, k_scale), _finite_where(low, v_scale)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * row_scale
            if CODES:
                s *= k_scale[None, :]
            elif BIAS:  # not in K itself: that would take it through registers, at a third of the time
                s = _finite_where(low[None, :], s)
            if SOFTCAP:
                s = _tanh(s) * softcap_log2
            if BIAS:
                s += tl.maximum(bias, -2.0e38) * LOG2E  # the lowest number stays one; what is -inf is not visible
            if MASK < 2 and BIAS != 2:
                visible = key_ok[None, :]
                if CAUSAL:
                    visible = visible & _in_band(keys, last, window, WINDOW)
            s = tl.where(visible, s, float("-inf"))

            m_new = tl.maximum(m, tl.max(s, 1))
            m_use = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet: -inf - -inf would be NaN
            p = tl.exp2(s - m_use[:, None])
            fade = tl.exp2(m - m_use)
            if LAZY_SUM:
                norm = norm * fade[:, None] + p
            else:
                norm = norm * fade + tl.sum(p, 1)
            m = m_new

            if WORDS:
                w_ok = key_ok[:, None]
                if DV != BLOCK_DV:
                    w_ok = w_ok & (tl.arange(0, BLOCK_DV // 4) < DV // 4)[None, :]
                w_base = (v_base + start.to(tl.int64) * v_s).to(tl.pointer_type(tl.int32), bitcast=True)
                w_rows = w_base + offs_n * (v_s // 4)
                w = tl.load(w_rows[:, None] + tl.arange(0, BLOCK_DV // 4)[None, :], mask=w_ok, other=0)
                v = numbers_of_words(w, V_CODES, DOTS, FAST)
            elif DV == BLOCK_DV:
                v = tl.load(v_rows[:, None] + offs_dv[None, :], mask=key_ok[:, None], other=0.0, eviction_policy=EVICT)
            else:
                v_mask = key_ok[:, None] & dv_ok[None, :]
                v = tl.load(v_rows[:, None] + offs_dv[None, :], mask=v_mask, other=0.0, eviction_policy=EVICT)
            if CODES:
                if not WORDS:
                    v = numbers(v, V_CODES, DOTS, FAST)
                # scales as shares of the tile's largest: small ones must not be lost in fp16
                v_scale = tl.where(key_ok, v_scale, 0.0)
                most = tl.max(v_scale, 0)
                p *= (v_scale / tl.where(most > 0, most, 1.0))[None, :]
                acc = acc * fade[:, None] + tl.dot(p.to(DOTS), v, input_precision=PRECISION) * most
                ahead = keys + BLOCK_N  # the next tile's, before it is worked on
                k_scale = tl.load(k_scales + ahead, mask=ahead < hi, other=0.0).to(tl.float32)
                v_scale = tl.load(v_scales + ahead, mask=ahead < hi, other=0.0).to(tl.float32)
            else:
                if BIAS:  # noqa: SIM102 (a constant)
                    if tl.max(low.to(tl.int32), 0) > 0:  # seldom, and dear
                        v = _finite_where(low[:, None], v)
                acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)

        if PDL and SPLIT:  # noqa: SIM102 (constants). The merge is set up while the last results are written
            if tile + count >= stop:
                gdc_launch_dependents()
        if LAZY_SUM:
            norm = tl.sum(norm, 1)
        some = norm > 0
        if count == tiles:  # the whole head: the result
            if HAS_SINKS:
                sink = tl.load(Sinks + head, mask=row_ok, other=float("-inf")).to(tl.float32) * LOG2E
                top = tl.maximum(m, sink)
                top = tl.where(top == float("-inf"), 0.0, top)
                fade = tl.exp2(m - top)
                norm = norm * fade + tl.exp2(sink - top)
                acc *= fade[:, None]
                m = top
                some = norm > 0
            acc /= tl.where(some, norm, 1.0)[:, None]
            out_row = (b64 * Sq + position) * (HKV * G) + head
            tl.store(
                Out + (out_row * DV)[:, None] + offs_dv[None, :],
                acc.to(Out.dtype.element_ty),
                mask=row_ok[:, None] & dv_ok[None, :],
            )
            if HAS_LSE:
                lse = tl.where(some, m + tl.log2(tl.where(some, norm, 1.0)), float("-inf")) * LN2
                tl.store(Lse + (b64 * (HKV * G) + head) * Sq + position, lse, mask=row_ok)
        elif SPLIT:
            acc /= tl.where(some, norm, 1.0)[:, None]
            lse = tl.where(some, m + tl.log2(tl.where(some, norm, 1.0)), float("-inf"))
            part_row = (2 * worker + (begin == 0).to(tl.int32)) * (G * Sq) + rows
            tl.store(Part + lse_offset(workers, G, Sq, DV) + part_row, lse, mask=row_ok)
            tl.store(
                Part + part_row.to(tl.int64)[:, None] * DV + offs_dv[None, :],
                acc,
                mask=row_ok[:, None] & dv_ok[None, :],
            )
        if SPLIT:
            tile += count
        else:
            tile = stop
