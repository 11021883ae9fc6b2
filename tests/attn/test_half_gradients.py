"""Gradients in half precision, held to twice the error of plain attention: what a group adds up must not be rounded."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conformance import assert_conforms
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_patch import attention, attention_varlen
from hf_attn_patch.attn.backends import _sdpa_members
from hf_attn_patch.attn.request import Operands
from hf_attn_patch.attn.visibility import Dense, full

HALVES = [torch.bfloat16, torch.float16]
GROUPINGS = [(32, 1), (32, 4), (8, 8), (12, 3)]


def plain(q, k, v, see=None, bias=None):
    """Attention as it is written down, in the dtype of its inputs, with the heads repeated."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if see is not None:
        scores = scores.masked_fill(~see, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0) @ v


def rows(B, HQ, HKV, Sq, Sk, D, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, HQ, Sq, D), (B, HKV, Sk, D), (B, HKV, Sk, D), (B, HQ, Sq, D))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def assert_gradients_conform(tested, inputs, aim, see=None, bias=None):
    results = []
    for function, wide in ((tested, False), (plain, False), (plain, True)):
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in inputs]
        more = {} if function is tested else {"see": see, "bias": bias}
        out = function(*leaves, **more)
        assert wide or out.dtype == inputs[0].dtype
        results.append((out, *torch.autograd.grad(out, leaves, aim.to(out.dtype))))
    for mine, low, truth in zip(*results, strict=True):
        assert_conforms(mine, low, truth)


@pytest.mark.parametrize("kind", ["no mask", "causal", "padding", "rows", "heads", "bias", "window"])
@pytest.mark.parametrize(("HQ", "HKV"), GROUPINGS)
@pytest.mark.parametrize("dtype", HALVES)
def test_of_every_mask(dtype, HQ, HKV, kind):
    B, S = 2, 160
    *inputs, aim = rows(B, HQ, HKV, S, S, 32, dtype)
    lower = torch.ones(S, S, dtype=torch.bool).tril()
    g = torch.Generator().manual_seed(1)
    see = {
        "causal": lower,
        "padding": (torch.arange(S) < torch.tensor([S, 90])[:, None])[:, None, None],
        "rows": torch.rand(B, 1, S, S, generator=g) < 0.5,
        "heads": torch.rand(B, HQ, S, S, generator=g) < 0.5,
        "window": lower & ~lower.tril(-5),
    }.get(kind)
    bias = torch.randn(1, HQ, S, S, generator=g).to(dtype) if kind == "bias" else None
    of_kinds: dict[Any, dict[str, Any]] = {"causal": {"causal": True}, "window": {"window": 5}, "no mask": {}}
    options = of_kinds.get(kind, {"mask": see, "bias": bias})
    assert_gradients_conform(lambda q, k, v: attention(q, k, v, **options), inputs, aim, see, bias)


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(HALVES), heads=st.sampled_from([*GROUPINGS, (6, 2)]), D=st.sampled_from([32, 40, 96, 128]),
    Sq=st.integers(1, 130), more=st.sampled_from([0, 1, 37]), causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_of_any_shape(dtype, heads, D, Sq, more, causal, seed):
    *inputs, aim = rows(1, heads[0], heads[1], Sq, Sq + more, D, dtype, seed)
    see = torch.ones(Sq, Sq + more, dtype=torch.bool).tril(more) if causal else None
    assert_gradients_conform(lambda q, k, v: attention(q, k, v, causal=causal), inputs, aim, see)


@pytest.mark.parametrize("dtype", HALVES)
def test_of_a_long_sequence_behind_a_short_window(dtype):
    """Blocks of queries share keys."""
    S = 1100
    *inputs, aim = rows(1, 8, 1, S, S, 32, dtype)
    lower = torch.ones(S, S, dtype=torch.bool).tril()
    see = lower & ~lower.tril(-200)
    assert_gradients_conform(lambda q, k, v: attention(q, k, v, window=200), inputs, aim, see)


@pytest.mark.parametrize("dtype", HALVES)
def test_of_packed_documents(dtype):
    borders, T = [0, 3, 3, 90, 200], 200
    *inputs, aim = rows(1, 16, 1, T, T, 32, dtype)
    document = torch.bucketize(torch.arange(T), torch.tensor(borders[1:]), right=True)
    see = (document[:, None] == document) & torch.ones(T, T, dtype=torch.bool).tril()

    def packed(q, k, v):
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        return attention_varlen(q, k, v, torch.tensor(borders), causal=True).transpose(0, 1)[None]

    assert_gradients_conform(packed, inputs, aim, see)


@pytest.mark.parametrize("dtype", HALVES)
def test_under_autocast_and_in_a_compiled_graph(dtype):
    *inputs, aim = rows(2, 16, 1, 70, 70, 32, dtype)
    see = torch.ones(70, 70, dtype=torch.bool).tril()

    def cast(q, k, v):
        with torch.autocast("cpu", dtype):
            return attention(q, k, v, causal=True)

    assert_gradients_conform(cast, inputs, aim, see)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, causal=True), backend="aot_eager", fullgraph=True)
    assert_gradients_conform(compiled, inputs, aim, see)


@pytest.mark.parametrize(
    "kind", ["no mask", "causal", "padding", "heads", "bias", "bias of each head", "bias of a large batch"]
)
@pytest.mark.parametrize(("HQ", "HKV"), GROUPINGS)
@pytest.mark.parametrize("dtype", HALVES)
def test_of_the_kernel_that_is_called_once_a_member_of_the_group(monkeypatch, dtype, HQ, HKV, kind):
    """The memory-efficient kernel of CUDA, of which a stand-in computes in fp32 and rounds what it gives."""

    def kernel(q, k, v, mask, save, dropout, causal, scale):
        see = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if causal else None
        bias = None if mask is None else mask.float()
        assert mask is None or mask.shape == (*q.shape[:3], k.shape[2])
        return plain(q.float(), k.float(), v.float(), see, bias).to(q.dtype), None

    monkeypatch.setattr(_sdpa_members, "efficient_attention_op", kernel)
    B, S = 16 if kind == "bias of a large batch" else 2, 48
    *inputs, aim = rows(B, HQ, HKV, S, S, 32, dtype)
    aim = aim.abs()  # the group's parts of dV have one sign: their sum grows, and what it loses at each rounding
    g = torch.Generator().manual_seed(1)
    see = {
        "causal": torch.ones(S, S, dtype=torch.bool).tril(),
        "padding": (torch.arange(S) < torch.tensor([S, 30])[:, None])[:, None, None],
        "heads": torch.rand(B, HQ, S, S, generator=g) < 0.5,
    }.get(kind)
    biased = kind.startswith("bias")
    if biased:
        inputs.append(torch.randn(1, 1 if kind == "bias" else HQ, S, S, generator=g).to(dtype))
    mask = see if kind in ("padding", "heads") else None
    layout = Dense(B, S, S, mask=mask) if mask is not None else full(S, S, False, (None, None), B)
    request: Any = SimpleNamespace(bias=biased, tracing=False, grad=True)

    def grouped(q, k, v, bias=None):
        operands = Operands(layout, 32**-0.5, bias=bias)
        return _sdpa_members.efficient(q, k, v, mask if bias is None else bias, kind == "causal", request, operands)

    if biased:
        results = []
        for function, wide in ((grouped, False), (plain, False), (plain, True)):
            leaves = [(t.double() if wide else t).detach().requires_grad_() for t in inputs]
            q, k, v, bias = leaves
            out = function(q, k, v, bias=bias)
            results.append((out, *torch.autograd.grad(out, leaves, aim.to(out.dtype))))
        for mine, low, truth in zip(*results, strict=True):
            assert_conforms(mine, low, truth)
    else:
        assert_gradients_conform(grouped, inputs, aim, see)
