"""Products of weights with one vector, which are reading the weights and nothing else: several of one vector in one
kernel, or two with the gated activation behind them. The first weights are read while the kernel before still runs."""

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

MOST = 3  # weights of one vector in one kernel


class Tiles(NamedTuple):
    """Outputs and inputs that a program takes at a time, and its warps."""

    block_n: int
    block_k: int
    warps: int


@triton.jit
def matvec_kernel(
    X, W0, W1, W2, B0, B1, B2, Y0, Y1, Y2, N0, N1, N2, K,
    PARTS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``W @ x`` for BLOCK_N rows of one of the weights; GATED: ``act(W0 @ x) * (W1 @ x)``."""
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
    k = tl.arange(0, BLOCK_K)
    ok = n < N
    rows = tl.where(ok, n, 0).to(tl.int64)[:, None] * K
    dtype = Y0.dtype.element_ty
    w = _piece(W + rows, k, K, EVEN)
    u = w
    if GATED:
        u = _piece(W1 + rows, k, K, EVEN)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = acc
    for start in range(0, K, BLOCK_K):
        x = _piece(X + tl.zeros([1, 1], tl.int64), start + k, K, EVEN).to(tl.float32)
        acc += w.to(tl.float32) * x
        w = _piece(W + rows, start + BLOCK_K + k, K, False)
        if GATED:
            up += u.to(tl.float32) * x
            u = _piece(W1 + rows, start + BLOCK_K + k, K, False)
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        y += tl.load(B + n, mask=ok, other=0.0).to(tl.float32)
    if GATED:
        z = tl.sum(up, 1)
        if HAS_BIAS:
            z += tl.load(B1 + n, mask=ok, other=0.0).to(tl.float32)
        y = _activated(y.to(dtype).to(tl.float32), ACT).to(dtype).to(tl.float32) * z.to(dtype).to(tl.float32)
    tl.store(Y + n, y.to(dtype), mask=ok)


@triton.jit
def _piece(rows, k, K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(rows + k[None, :])
    return tl.load(rows + k[None, :], mask=k[None, :] < K, other=0.0)


def tiles_for(K: int, several: bool) -> Tiles:
    """What was fastest on one H100 (``benchmarks/results/recorded_step.md``)."""
    return Tiles(2 if several else 4, min(1024, power_of_two(K)), 4)


def matvec(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], act: int | None = None,
    tiles: Tiles | None = None,
) -> list[Tensor]:  # fmt: skip
    """``W @ x`` [1, N] for each weight; with ``act`` that of two: ``act(W0 @ x) * (W1 @ x)``, both rounded before.

    Args:
        x: [1, K], contiguous.
        weights: [N, K], contiguous, at most three of one K.
        biases: [N] or None for each; all or none.
    """
    K, device = x.shape[-1], x.device
    sizes = [w.shape[0] for w in weights]
    out = [torch.empty(1, N, dtype=x.dtype, device=device) for N in (sizes if act is None else sizes[:1])]
    tiles = tiles or tiles_for(K, len(weights) > 1)
    spare = MOST - len(weights)
    ws, bs = [*weights, *[weights[0]] * spare], [*biases, *[biases[0]] * spare]
    ys, ns = [*out, *out[:1] * (MOST - len(out))], [*sizes, *[0] * (MOST - len(sizes))]
    programs = sum(-(-t.shape[1] // tiles.block_n) for t in out)
    with _on(x):
        matvec_kernel[(programs,)](
            x, *ws, *bs, *ys, *ns, K, PARTS=len(weights), GATED=act is not None, ACT=act or 0,
            HAS_BIAS=biases[0] is not None, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, EVEN=K % tiles.block_k == 0,
            num_warps=tiles.warps, **_started_early(device),
        )  # fmt: skip
    return out
