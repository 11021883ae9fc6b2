"""The Triton kernel that merges the partial results of ``decode_kernel.py``, in a fixed order."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .decode_line import LN2, LOG2E, line_of, lse_offset, worker_of


@triton.jit(do_not_specialize=["B", "HKV", "G", "Sq", "Sk", "window", "least", "workers"])
def combine_kernel(
    Out, Lse, Part, First, End, Sinks, B, HKV, G, Sq, Sk, window, least, workers,
    DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
    WINDOW: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of one query row; write zeros for a row of no keys."""
    pid = tl.program_id(0)
    r = pid % (G * Sq)
    h = (pid // (G * Sq)) % HKV
    b = pid // (G * Sq * HKV)
    offs_dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    dv_ok = offs_dv < DV
    n, upto, share, more = line_of(
        First, End, B, HKV, Sq, Sk, window, least, workers, HAS_FIRST, HAS_END, WINDOW, BLOCK_N, BLOCK_B
    )
    here = tl.arange(0, BLOCK_B) == b
    tiles = tl.sum(tl.where(here, n, 0), 0)
    start = tl.sum(tl.where(here, upto, 0), 0) - tiles * (HKV - h)
    worker = worker_of(start, share, more)
    parts = worker_of(start + tiles - 1, share, more) - worker + 1
    if tiles == 0:
        parts = 0
    if PDL:
        gdc_wait()

    if parts != 1:
        m = tl.full([1], float("-inf"), tl.float32)
        norm = tl.zeros([1], tl.float32)
        head = h * G + r // Sq
        if HAS_SINKS:
            m = tl.zeros([1], tl.float32) + tl.load(Sinks + head).to(tl.float32) * LOG2E
            norm = tl.where(m == float("-inf"), 0.0, 1.0)
        acc = tl.zeros([BLOCK_DV], tl.float32)
        for i in tl.range(0, parts, BLOCK_P):
            part = i + tl.arange(0, BLOCK_P)
            part_row = (2 * (worker + part) + (part == 0).to(tl.int32)) * (G * Sq) + r
            part_ok = part < parts
            lse = tl.load(Part + lse_offset(workers, G, Sq, DV) + part_row, mask=part_ok, other=float("-inf"))
            values = tl.load(
                Part + part_row.to(tl.int64)[:, None] * DV + offs_dv[None, :],
                mask=part_ok[:, None] & dv_ok[None, :],
                other=0.0,
            )
            top = tl.maximum(m, tl.max(lse, 0))
            use = tl.where(top == float("-inf"), 0.0, top)
            weight = tl.exp2(lse - use)
            fade = tl.exp2(m - use)
            norm = norm * fade + tl.sum(weight, 0)
            acc = acc * fade + tl.sum(values * weight[:, None], 0)
            m = top
        some = norm > 0
        acc = acc / tl.where(some, norm, 1.0)
        b64 = b.to(tl.int64)
        out_row = (b64 * Sq + r % Sq) * (HKV * G) + head
        tl.store(Out + out_row * DV + offs_dv, acc.to(Out.dtype.element_ty), mask=dv_ok)
        if HAS_LSE:
            lse = tl.where(some, m + tl.log2(tl.where(some, norm, 1.0)), float("-inf")) * LN2
            lse_at = Lse + (b64 * (HKV * G) + head) * Sq + r % Sq + tl.arange(0, 1)
            tl.store(lse_at, lse, mask=(tl.program_id(1) + tl.arange(0, 1)) == 0)
