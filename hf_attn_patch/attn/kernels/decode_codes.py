"""Codes of 8 bits (int8, float8_e4m3fn) as numbers, inside the decode kernel.

A product on tensor cores takes fp16, in which every code is exact. To convert them one after the other (I2F, or F2F to
bf16) takes longer than to read them, so four codes that lie in one word are converted together: int8 by its byte behind
0x64, where c + 128 is the fp16 number 1024 + 128 + c (Kim et al. 2022, arXiv 2211.10017); fp8 by the instruction that
GPUs have from Ada on. Elsewhere, and in Triton's interpreter, which runs no assembly, by arithmetic.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

INT8 = tl.constexpr(1)
FP8 = tl.constexpr(2)


@triton.jit
def _by_arithmetic(codes, CODES: tl.constexpr, DOTS: tl.constexpr):
    """Int8 (for FP8 the bits of e4m3) as DOTS."""
    if CODES == FP8:  # sign, 4 and 3 bits at their places in fp16, whose exponents count from 8 less
        bits = codes.to(tl.int16)
        bits = (bits & -32768) | ((bits & 0x7F) << 7)
        return (bits.to(tl.float16, bitcast=True) * 256.0).to(DOTS)
    return codes.to(DOTS)


@triton.jit
def numbers(codes, CODES: tl.constexpr, DOTS: tl.constexpr, FAST: tl.constexpr):
    """Int8 codes of any shape as DOTS, exactly."""
    if FAST and CODES == INT8:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 x, low, high;
            xor.b32 x, $2, 0x80808080;
            prmt.b32 low, x, 0x64646464, 0x4140;
            prmt.b32 high, x, 0x64646464, 0x4342;
            mov.b32 x, 0x64806480;
            sub.f16x2 $0, low, x;
            sub.f16x2 $1, high, x;
            }
            """,
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    elif FAST:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        return _by_arithmetic(codes, CODES, DOTS)


@triton.jit
def numbers_of_words(words, CODES: tl.constexpr, DOTS: tl.constexpr, FAST: tl.constexpr):
    """Words [N, W] of four codes, int32, as [N, 4 W] DOTS, exactly.

    For values: their product goes along the keys, and of bytes that lie behind one another in the other direction
    there is no transposed load from shared memory. As fp16 there is, and only joined tensors are kept in it.
    """
    if FAST and CODES == INT8:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 x, low, high;
            xor.b32 x, $4, 0x80808080;
            prmt.b32 low, x, 0x64646464, 0x4140;
            prmt.b32 high, x, 0x64646464, 0x4342;
            mov.b32 x, 0x64806480;
            sub.f16x2 low, low, x;
            sub.f16x2 high, high, x;
            mov.b32 {$0, $1}, low;
            mov.b32 {$2, $3}, high;
            }
            """,
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    elif FAST:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .b16 l, h;
            .reg .b32 low, high;
            mov.b32 {l, h}, $4;
            cvt.rn.f16x2.e4m3x2 low, l;
            cvt.rn.f16x2.e4m3x2 high, h;
            mov.b32 {$0, $1}, low;
            mov.b32 {$2, $3}, high;
            }
            """,
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        a = _by_arithmetic(words.to(tl.int8), CODES, DOTS)
        b = _by_arithmetic((words >> 8).to(tl.int8), CODES, DOTS)
        c = _by_arithmetic((words >> 16).to(tl.int8), CODES, DOTS)
        d = _by_arithmetic((words >> 24).to(tl.int8), CODES, DOTS)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (words.shape[0], 4 * words.shape[1]))


@triton.jit
def for_codes(q, DOTS: tl.constexpr):
    """Queries in DOTS, each divided by its largest component, so that none overflows; and that, or 1 for zeros."""
    q = q.to(tl.float32)
    top = tl.max(tl.abs(q), 1)
    top = tl.where(top > 0, top, 1.0)
    return (q / top[:, None]).to(DOTS), top
