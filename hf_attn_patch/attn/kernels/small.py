"""Small operators of a decoding step, several in one kernel: norms, rotary embeddings with the cache's new token, and
gated activations. They round where the operators that they stand for round."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode_plan import overlaps, power_of_two

CAST, ONE_MORE, WIDE, BARE = 0, 1, 2, 3  # how a norm's weight goes in
SILU, GELU, GELU_TANH, RELU = 0, 1, 2, 3
MOST = 1 << 15  # elements of a row that is normed
ACROSS = 1024  # elements of a row that one program gates


def _started_early(device: torch.device) -> dict[str, Any]:
    early = device.type == "cuda" and overlaps(device)
    return {"PDL": early, "launch_pdl": early}


def _on(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _rows(t: Tensor) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """The last two sizes and all three strides of the dimensions before the last, of which there are three at most."""
    sizes, strides = [1, 1, 1, *t.shape[:-1]][-3:], [0, 0, 0, *t.stride()[:-1]][-3:]
    return (sizes[1], sizes[2]), (strides[0], strides[1], strides[2])


@triton.jit
def _row(row, n1, n2, s0, s1, s2):
    return (row // (n1 * n2)).to(tl.int64) * s0 + (row // n2 % n1).to(tl.int64) * s1 + (row % n2).to(tl.int64) * s2


@triton.jit
def norm_kernel(
    X, Added, W, Out, Sum, n1, n2, x0, x1, x2, a0, a1, a2, o0, o1, o2, s0, s1, s2, N, eps,
    FORM: tl.constexpr, HAS_ADDED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: (x + added) / rms, times a weight."""
    row = tl.program_id(0)
    n = tl.arange(0, BLOCK)
    ok = n < N
    dtype = Out.dtype.element_ty
    w = tl.zeros([BLOCK], tl.float32)
    if FORM != 3:  # BARE
        w = tl.load(W + n, mask=ok, other=0.0).to(tl.float32)  # a weight: nobody writes to it meanwhile
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(X + _row(row, n1, n2, x0, x1, x2) + n, mask=ok, other=0.0).to(tl.float32)
    if HAS_ADDED:
        x += tl.load(Added + _row(row, n1, n2, a0, a1, a2) + n, mask=ok, other=0.0).to(tl.float32)
        rounded = x.to(dtype)
        tl.store(Sum + _row(row, n1, n2, s0, s1, s2) + n, rounded, mask=ok)
        x = rounded.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / N + eps)
    if FORM == 0:  # CAST
        x = x.to(dtype).to(tl.float32) * w
    elif FORM == 1:  # ONE_MORE
        x = x * (1.0 + w)
    elif FORM == 2:  # WIDE
        x = x * w
    tl.store(Out + _row(row, n1, n2, o0, o1, o2) + n, x.to(dtype), mask=ok)


def norm(x: Tensor, added: Tensor | None, weight: Tensor | None, eps: float, form: int, like: Tensor) -> list[Tensor]:
    """RMSNorm of ``x + added``: the normed rows and, with ``added``, the sum.

    Args:
        x, added: [..., N], of at most four dimensions; rows contiguous.
        weight: [N]; None for the form BARE.
        form: CAST: rounded, then times the weight; ONE_MORE: times (1 + weight), then rounded; WIDE: times the weight,
            then rounded; BARE: rounded.
        like: shape, strides and dtype of the results.
    """
    N = x.shape[-1]
    out = torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device)
    total = torch.empty_like(out) if added is not None else None
    sizes, strides = _rows(x)
    block = power_of_two(N)
    with _on(x):
        norm_kernel[(x.numel() // N,)](
            x, added, weight, out, total, *sizes, *strides, *_rows(x if added is None else added)[1], *_rows(out)[1],
            *_rows(out if total is None else total)[1], N, eps, FORM=form, HAS_ADDED=added is not None, BLOCK=block,
            num_warps=min(16, max(1, block // 256)), **_started_early(x.device),
        )  # fmt: skip
    return [out] if total is None else [out, total]


@triton.jit
def rotary_kernel(
    Q, K, V, Cos, Sin, Out, Keys, Values, Index, HQ, HKV, D, DV, q_b, q_h, k_b, k_h, v_b, v_h, c_b, s_b, o_b, o_h,
    ks_b, ks_h, ks_s, vs_b, vs_h, vs_s,
    APPENDS: tl.constexpr, ROTATES: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one row: a query is turned, a key is turned and stored, a value is stored."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.zeros([], tl.int64)
    if APPENDS:
        at = tl.load(Index).to(tl.int64)
    if h < HQ + HKV:
        kv = (h - HQ).to(tl.int64)
        if h < HQ:
            source = Q + b * q_b + h.to(tl.int64) * q_h
            target = Out + b * o_b + h.to(tl.int64) * o_h
        else:
            source = K + b * k_b + kv * k_h
            target = Keys + b * ks_b + kv * ks_h + at * ks_s
        if ROTATES:
            n = tl.arange(0, HALF)
            half = D // 2
            ok = n < half
            dtype = Q.dtype.element_ty
            low = tl.load(source + n, mask=ok, other=0.0).to(tl.float32)
            high = tl.load(source + half + n, mask=ok, other=0.0).to(tl.float32)
            cos = tl.load(Cos + b * c_b + n, mask=ok, other=0.0).to(tl.float32)
            sin = tl.load(Sin + b * s_b + n, mask=ok, other=0.0).to(tl.float32)
            cos2 = tl.load(Cos + b * c_b + half + n, mask=ok, other=0.0).to(tl.float32)
            sin2 = tl.load(Sin + b * s_b + half + n, mask=ok, other=0.0).to(tl.float32)
            first = (low * cos).to(dtype).to(tl.float32) + (-high * sin).to(dtype).to(tl.float32)
            second = (high * cos2).to(dtype).to(tl.float32) + (low * sin2).to(dtype).to(tl.float32)
            tl.store(target + n, first.to(dtype), mask=ok)
            tl.store(target + half + n, second.to(dtype), mask=ok)
        else:
            d = tl.arange(0, BLOCK)
            tl.store(target + d, tl.load(source + d, mask=d < D), mask=d < D)
    else:
        kv = (h - HQ - HKV).to(tl.int64)
        d = tl.arange(0, BLOCK)
        value = tl.load(V + b * v_b + kv * v_h + d, mask=d < DV)
        tl.store(Values + b * vs_b + kv * vs_h + at * vs_s + d, value, mask=d < DV)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, like_q: Tensor, like_k: Tensor) -> list[Tensor]:
    """``x * cos + rotate_half(x) * sin`` of q [B, HQ, 1, D] and k [B, HKV, 1, D]; cos and sin [B or 1, 1, 1, D]."""
    q_out = torch.empty_strided(like_q.shape, like_q.stride(), dtype=q.dtype, device=q.device)
    k_out = torch.empty_strided(like_k.shape, like_k.stride(), dtype=k.dtype, device=k.device)
    _rotary((q, k, None), (cos, sin), q_out, (k_out, None), None)
    return [q_out, k_out]


def rotate_and_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, index: Tensor, like: Tensor
) -> list[Tensor]:
    """:func:`rotate`; the turned k, and v [B, HKV, 1, Dv], go to keys and values [B, HKV, capacity, D] at ``index``."""
    q_out = torch.empty_strided(like.shape, like.stride(), dtype=q.dtype, device=q.device)
    _rotary((q, k, v), (cos, sin), q_out, (keys, values), index)
    return [q_out]


def append(keys: Tensor, values: Tensor, index: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """k and v [B, HKV, 1, D] go to keys and values [B, HKV, capacity, D] at ``index`` int64 [1]."""
    _rotary((None, k, v), None, None, (keys, values), index)
    return []


rotate_and_append.writes = append.writes = True  # type: ignore[attr-defined]


def _rotary(
    qkv: tuple[Tensor | None, Tensor, Tensor | None],
    turn: tuple[Tensor, Tensor] | None,
    out: Tensor | None,
    buffers: tuple[Tensor, Tensor | None],
    index: Tensor | None,
) -> None:
    q, k, v = qkv
    keys, values = buffers
    B, HKV, _, D = k.shape
    HQ = 0 if q is None else q.shape[1]
    DV = D if v is None else v.shape[-1]
    cos, sin = turn or (None, None)
    turns = [0 if t is None or t.shape[0] == 1 else t.stride(0) for t in (cos, sin)]
    heads = [s for t in (q, k, v) for s in ((0, 0) if t is None else t.stride()[:2])]
    outs = (0, 0) if out is None else out.stride()[:2]
    memory = [keys if t is None else t for t in (out, keys, values)]
    rows = (*keys.stride()[:3], *((0, 0, 0) if values is None else values.stride()[:3]))
    with _on(k):
        rotary_kernel[(B, HQ + HKV * (1 if v is None else 2))](
            *(k if t is None else t for t in (q, k, v)), cos, sin, *memory,
            index, HQ, HKV, D, DV, *heads, *turns, *outs, *rows,
            APPENDS=index is not None, ROTATES=turn is not None, HALF=power_of_two(max(1, D // 2)),
            BLOCK=power_of_two(max(D, DV)), num_warps=1, **_started_early(k.device),
        )  # fmt: skip


@triton.jit
def _activated(x, ACT: tl.constexpr):
    if ACT == 0:  # SILU
        return x / (1.0 + tl.exp(-x))
    elif ACT == 1:  # GELU
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == 2:  # GELU_TANH
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return 0.5 * x * (2.0 - 2.0 / (tl.exp(2.0 * z) + 1.0))
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def gated_kernel(
    Gate, Up, Out, n1, n2, g0, g1, g2, u0, u1, u2, o0, o1, o2, N,
    ACT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A piece of one row: act(gate) * up."""
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = n < N
    dtype = Out.dtype.element_ty
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(Gate + _row(row, n1, n2, g0, g1, g2) + n, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(Up + _row(row, n1, n2, u0, u1, u2) + n, mask=ok, other=0.0).to(tl.float32)
    out = _activated(gate, ACT).to(dtype).to(tl.float32) * up
    tl.store(Out + _row(row, n1, n2, o0, o1, o2) + n, out.to(dtype), mask=ok)


def gated(gate: Tensor, up: Tensor, act: int, like: Tensor) -> list[Tensor]:
    """``act(gate) * up`` of two [..., N] of one shape, of at most four dimensions; rows contiguous."""
    out = torch.empty_strided(like.shape, like.stride(), dtype=gate.dtype, device=gate.device)
    N = gate.shape[-1]
    sizes, strides = _rows(gate)
    with _on(gate):
        gated_kernel[(gate.numel() // N, -(-N // ACROSS))](
            gate, up, out, *sizes, *strides, *_rows(up)[1], *_rows(out)[1], N,
            ACT=act, BLOCK=min(ACROSS, power_of_two(N)), num_warps=4, **_started_early(gate.device),
        )  # fmt: skip
    return [out]
