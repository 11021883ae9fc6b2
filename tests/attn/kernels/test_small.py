"""Small operators in one kernel, and products of a few rows, against fp64, by Triton's interpreter without a GPU."""

from __future__ import annotations

import interpreter  # isort: skip - before the kernels

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hf_attn_patch.attn.kernels import few_rows, small
from hf_attn_patch.attn.kernels.matvec import Tiles, matvec

DEVICE = interpreter.DEVICE
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # interpreted casts cut off
ACTS: dict[int, Any] = {
    small.SILU: F.silu,
    small.GELU: F.gelu,
    small.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    small.RELU: F.relu,
}


def made(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape))).to(DEVICE, dtype)


def held(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Twice the error of plain PyTorch in the same dtype, and one rounding of the largest number."""
    slack = torch.finfo(plain.dtype).eps * exact.abs().max()
    assert found.shape == plain.shape
    assert found.dtype == plain.dtype
    assert (found.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + slack


def stock_norm(x: Tensor, weight: Tensor | None, eps: float, form: int) -> Tensor:
    """As Llama, Gemma, OLMo 2 and Llama 4's L2 norm write it; in fp64 nothing is rounded."""
    wide = x.float() if x.dtype != torch.float64 else x
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return y.to(x.dtype)
    if form == small.CAST:
        return weight * y.to(x.dtype)
    w = weight.to(wide.dtype)
    return (y * (1.0 + w if form == small.ONE_MORE else w)).to(x.dtype)


@settings(max_examples=25, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    N=st.sampled_from([1, 5, 64, 100, 257]),
    form=st.sampled_from([small.CAST, small.ONE_MORE, small.WIDE, small.BARE]),
    dtype=st.sampled_from(DTYPES),
    adds=st.booleans(),
    turned=st.booleans(),
)
def test_norm(lead: list[int], N: int, form: int, dtype: torch.dtype, adds: bool, turned: bool) -> None:
    x, other = made(*lead, N, dtype=dtype), made(*lead, N, dtype=dtype, seed=1)
    if turned and len(lead) > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    weight = None if form == small.BARE else made(N, dtype=dtype, seed=2)
    total = x + other if adds else x
    plain = stock_norm(total, weight, 1e-6, form)
    exact = stock_norm(total.double(), None if weight is None else weight.double(), 1e-6, form)
    found = small.norm(x, other if adds else None, weight, 1e-6, form, plain)
    held(found[0], plain, exact)
    if adds:
        torch.testing.assert_close(found[1], total, rtol=0, atol=0)


def stock_turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


@settings(max_examples=20, deadline=None)
@given(
    B=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    D=st.sampled_from([2, 16, 80, 96]),
    DV=st.sampled_from([16, 24]),
    dtype=st.sampled_from(DTYPES),
    each=st.booleans(),
    place=st.integers(0, 6),
)
def test_rotary(
    B: int, heads: tuple[int, int], D: int, DV: int, dtype: torch.dtype, each: bool, place: int
) -> None:  # fmt: skip
    """Turned alone, and turned with the new token written to its place in the cache and nowhere else."""
    HQ, HKV = heads
    q = made(B, 1, HQ, D, dtype=dtype).transpose(1, 2)
    k, v = made(B, 1, HKV, D, dtype=dtype, seed=1).transpose(1, 2), made(B, HKV, 1, DV, dtype=dtype, seed=2)
    cos, sin = (made(B if each else 1, 1, 1, D, dtype=dtype, seed=s) for s in (3, 4))
    q_plain, k_plain = stock_turn(q, cos, sin), stock_turn(k, cos, sin)
    q_exact, k_exact = (stock_turn(x.double(), cos.double(), sin.double()) for x in (q, k))
    q_found, k_found = small.rotate(q, k, cos, sin, q_plain, k_plain)
    held(q_found, q_plain, q_exact)
    held(k_found, k_plain, k_exact)
    keys, values = made(B, HKV, 7, D, dtype=dtype, seed=5), made(B, HKV, 7, DV, dtype=dtype, seed=6)
    index = torch.tensor([place], device=DEVICE)
    expected = keys.index_copy(2, index, k_found), values.index_copy(2, index, v)
    (again,) = small.rotate_and_append(q, k, v, cos, sin, keys, values, index, q_plain)
    torch.testing.assert_close((again, keys, values), (q_found, *expected), rtol=0, atol=0)
    fresh = torch.zeros_like(keys), torch.zeros_like(values)
    small.append(*fresh, index, k, v)
    torch.testing.assert_close(fresh[0][:, :, place], k[:, :, 0], rtol=0, atol=0)
    torch.testing.assert_close(fresh[1][:, :, place], v[:, :, 0], rtol=0, atol=0)
    assert sum(int((f != 0).any(-1).any(0).any(0).sum()) for f in fresh) <= 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_gated(act: int, dtype: torch.dtype) -> None:
    both = 4 * made(2, 3, 2 * 1100, dtype=dtype)  # wide enough for both ends of an activation
    for gate, up in (both.chunk(2, -1), (both[..., :7], both[..., 7:14])):
        plain = ACTS[act](gate) * up
        exact = ACTS[act](gate.double()) * up.double()
        held(small.gated(gate, up, act, plain)[0], plain, exact)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 7, 16, 40]), min_size=1, max_size=3),
    K=st.sampled_from([1, 16, 33, 130]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    biased=st.booleans(),
    tiles=st.sampled_from([None, Tiles(4, 32, 1), Tiles(8, 64, 2)]),
)
def test_products_of_one_row(
    sizes: list[int], K: int, dtype: torch.dtype, biased: bool, tiles: Tiles | None
) -> None:  # fmt: skip
    x = made(1, K, dtype=dtype)
    weights = [made(N, K, dtype=dtype, seed=i) for i, N in enumerate(sizes)]
    biases = [made(N, dtype=dtype, seed=9) if biased else None for N in sizes]
    for found, w, b in zip(matvec(x, weights, biases, None, tiles), weights, biases, strict=True):
        held(found, F.linear(x, w, b), F.linear(x.double(), w.double(), None if b is None else b.double()))


@settings(max_examples=20, deadline=None)
@given(
    M=st.integers(1, 16),
    sizes=st.lists(st.sampled_from([1, 7, 16, 40]), min_size=1, max_size=3),
    K=st.sampled_from([16, 33, 130]),
    biased=st.booleans(),
    tiles=st.sampled_from([None, few_rows.Tiles(16, 32, 1, 2)]),
)
def test_products_of_a_few_rows(
    M: int, sizes: list[int], K: int, biased: bool, tiles: few_rows.Tiles | None
) -> None:  # fmt: skip
    x = made(M, K, dtype=torch.float16)
    weights = [made(N, K, dtype=torch.float16, seed=i) for i, N in enumerate(sizes)]
    biases = [made(N, dtype=torch.float16, seed=9) if biased else None for N in sizes]
    for found, w, b in zip(few_rows.few_rows(x, weights, biases, None, tiles), weights, biases, strict=True):
        held(found, F.linear(x, w, b), F.linear(x.double(), w.double(), None if b is None else b.double()))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("act", ACTS)
def test_gated_products(act: int, biased: bool) -> None:
    x, gate, up = made(1, 100, dtype=torch.float16), *(made(50, 100, dtype=torch.float16, seed=s) / 8 for s in (1, 2))
    biases = [made(50, dtype=torch.float16, seed=s) if biased else None for s in (3, 4)]
    g, u = (F.linear(x, w, b) for w, b in zip((gate, up), biases, strict=True))
    exact = ACTS[act](g.double()) * u.double()  # both are rounded before
    held(matvec(x, [gate, up], biases, act)[0], ACTS[act](g) * u, exact)
    x = made(5, 100, dtype=torch.float16, seed=8)
    g, u = (F.linear(x, w, b) for w, b in zip((gate, up), biases, strict=True))
    exact = ACTS[act](g.double()) * u.double()
    held(few_rows.few_rows(x, [gate, up], biases, act)[0], ACTS[act](g) * u, exact)
