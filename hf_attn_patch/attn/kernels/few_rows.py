"""Products of weights with 2 to 16 vectors, as ``matvec.py`` has them for one: on the matrix units, which the vectors
fill no more than a quarter of; it is reading the weights that takes the time."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode_plan import power_of_two
from .small import _activated, _on, _started_early

ROWS = 16  # vectors at most
MOST = 3  # weights of the same vectors in one kernel
LINE = tl.constexpr(64)  # 16-bit numbers in a line of the cache


class Tiles(NamedTuple):
    """Outputs and inputs that a program takes at a time, its warps, and the tiles in flight."""

    block_n: int
    block_k: int
    warps: int
    stages: int


@triton.jit
def few_rows_kernel(
    X, W0, W1, W2, B0, B1, B2, Y0, Y1, Y2, M, N0, N1, N2, K,
    PARTS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``X @ W.T`` for BLOCK_N columns of one of the weights; GATED: ``act(X @ W0.T) * (X @ W1.T)``."""
    p = tl.program_id(0)
    W, B, Y, N = W0, B0, Y0, N0
    if PARTS > 1 and not GATED:
        one = tl.cdiv(N0, BLOCK_N)
        if p >= one:
            p -= one
            W, B, Y, N = W1, B1, Y1, N1
            if PARTS > 2:  # noqa: SIM102 (constants)
                if p >= tl.cdiv(N1, BLOCK_N):
                    p -= tl.cdiv(N1, BLOCK_N)
                    W, B, Y, N = W2, B2, Y2, N2
    n = p * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    ok, here = n < N, m < M
    rows = tl.where(ok, n, 0).to(tl.int64) * K
    dtype = Y0.dtype.element_ty
    if PDL:  # the first weights come into the cache while the kernel before still runs
        gdc_launch_dependents()
        if AHEAD:
            lines = tl.minimum(tl.arange(0, AHEAD) * LINE, K - 1)
            _prefetch(W + rows[:, None] + lines[None, :])
            if GATED:
                _prefetch(W1 + rows[:, None] + lines[None, :])
        gdc_wait()
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    up = tl.zeros([ROWS, BLOCK_N], tl.float32)
    at = tl.where(here, m, 0).to(tl.int64)[:, None] * K
    for start in tl.range(0, K, BLOCK_K):
        c = start + k
        if EVEN:
            x = tl.load(X + at + c[None, :])
            acc = tl.dot(x, tl.load(W + rows[None, :] + c[:, None]), acc)
            if GATED:
                up = tl.dot(x, tl.load(W1 + rows[None, :] + c[:, None]), up)
        else:
            x = tl.load(X + at + c[None, :], mask=c[None, :] < K, other=0.0)
            acc = tl.dot(x, tl.load(W + rows[None, :] + c[:, None], mask=c[:, None] < K, other=0.0), acc)
            if GATED:
                up = tl.dot(x, tl.load(W1 + rows[None, :] + c[:, None], mask=c[:, None] < K, other=0.0), up)
    if HAS_BIAS:
        acc += tl.load(B + n, mask=ok, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(B1 + n, mask=ok, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = _activated(acc.to(dtype).to(tl.float32), ACT).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
    tl.store(Y + m.to(tl.int64)[:, None] * N + n[None, :], acc.to(dtype), mask=here[:, None] & ok[None, :])


@triton.jit
def _prefetch(pointers):
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


def tiles_for(K: int, gated: bool) -> Tiles:
    """What was fastest on one H100 (``benchmarks/results/recorded_step.md``)."""
    wide = max(16, power_of_two(K))
    return Tiles(32, min(256, wide), 4, 4) if gated else Tiles(16, min(512, wide), 4, 3)


def beats_cublas(weights: Sequence[Tensor]) -> bool:
    """Whether these weights are read faster here than by cuBLAS: not one alone whose rows are long and few (measured on
    one H100, 16 vectors)."""
    return len(weights) > 1 or weights[0].shape[1] <= 2 * weights[0].shape[0]


def few_rows(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], act: int | None = None,
    tiles: Tiles | None = None, ahead: int = 16,
) -> list[Tensor]:  # fmt: skip
    """``x @ W.T`` [M, N] for each weight; with ``act`` of two, rounded before: ``act(x @ W0.T) * (x @ W1.T)``.

    Args:
        x: [M, K], M up to 16, contiguous; fp16 or bf16.
        weights: [N, K], contiguous, at most three of one K.
        biases: [N] or None for each; all or none.
        tiles: 16 inputs at least.
        ahead: lines of 128 bytes of each weight's row that are fetched before the vectors are there; a power of two.
    """
    (M, K), device = x.shape, x.device
    sizes = [w.shape[0] for w in weights]
    out = [torch.empty(M, N, dtype=x.dtype, device=device) for N in (sizes if act is None else sizes[:1])]
    tiles = tiles or tiles_for(K, act is not None)
    spare = MOST - len(weights)
    ws, bs = [*weights, *[weights[0]] * spare], [*biases, *[biases[0]] * spare]
    ys, ns = [*out, *out[:1] * (MOST - len(out))], [*sizes, *[0] * (MOST - len(sizes))]
    programs = sum(-(-t.shape[1] // tiles.block_n) for t in out)
    with _on(x):
        few_rows_kernel[(programs,)](
            x, *ws, *bs, *ys, M, *ns, K, PARTS=len(weights), GATED=act is not None, ACT=act or 0,
            HAS_BIAS=biases[0] is not None, ROWS=ROWS, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
            EVEN=K % tiles.block_k == 0, AHEAD=ahead, num_warps=tiles.warps, num_stages=tiles.stages,
            **_started_early(device),
        )  # fmt: skip
    return out
