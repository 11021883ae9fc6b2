"""The function against an independent fp64 loop, over shapes, groupings, masks and options."""

from __future__ import annotations

import doctest
import importlib
import math
from typing import Any

import pytest
import torch
from conformance import assert_conforms
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_attn_patch
from hf_attn_patch import AttentionError, GroupingError, attention, attention_varlen
from hf_attn_patch.attn.backends import _blocks, torch_sdpa


def truth(q, k, v, *, see=None, scale=None, softcap=None, bias=None, sinks=None):
    """One head and one row after another, in fp64, with K and V looked up by head number."""
    q, k, v = q.double(), k.double(), v.double()
    (B, HQ, Sq, D), HKV = q.shape, k.shape[1]
    out = torch.zeros(B, HQ, Sq, v.shape[-1], dtype=torch.float64)
    for b in range(B):
        for h in range(HQ):
            kh, vh = k[b, h * HKV // HQ], v[b, h * HKV // HQ]
            for i in range(Sq):
                seen = torch.ones(k.shape[2], dtype=torch.bool) if see is None else see[b, h, i]
                if not seen.any():
                    continue
                s = (kh[seen] @ q[b, h, i]) * (1 / math.sqrt(D) if scale is None else scale)
                if softcap is not None:
                    s = softcap * torch.tanh(s / softcap)
                if bias is not None:
                    s = s + bias[b, h, i].double()[seen]
                extra = [] if sinks is None else [sinks[h].double()[None]]
                p = torch.softmax(torch.cat([s, *extra]), 0)[: len(s)]
                out[b, h, i] = p @ vh[seen]
    return out


def tensors(B, HQ, HKV, Sq, Sk, D, Dv=None, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, HQ, Sq, D), (B, HKV, Sk, D), (B, HKV, Sk, Dv or D))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def seen(B, HQ, Sq, Sk, *, causal=False, window=None, keys=None):
    i, j = torch.arange(Sq)[:, None] + Sk - Sq, torch.arange(Sk)[None]
    see = torch.ones(Sq, Sk, dtype=torch.bool)
    if causal:
        see &= j <= i
    if window is not None:
        left, right = window
        see &= (i - j <= left) if left is not None else True
        see &= (j - i <= right) if right is not None else True
    see = see.expand(B, HQ, Sq, Sk)
    return see if keys is None else see & keys[:, None, None]


@pytest.mark.parametrize(
    "name",
    [
        "attn.dispatch",
        "attn.functional",
        "hf.mask_function",
        "hf.mask_pattern",
        "attn.visibility",
        "attn.banded",
        "enabling",
    ],
)
def test_docstrings(name):
    module = importlib.import_module(f"hf_attn_patch.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_request(data):
    draw = data.draw
    HKV, G = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    B, Sq, Sk = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.integers(1, 24))
    D, Dv = draw(st.sampled_from([8, 11, 16, 40])), draw(st.sampled_from([None, 8, 24]))
    causal = draw(st.booleans())
    window = draw(st.sampled_from([None, 1, 3, (2, 2), (None, 1), (4, None)]))
    softcap = draw(st.sampled_from([None, 5.0]))
    scale = draw(st.sampled_from([None, 0.3]))
    sinks = torch.randn(HKV * G) if draw(st.booleans()) else None
    bias = torch.randn(1, HKV * G, Sq, Sk) if draw(st.booleans()) else None
    keys = torch.rand(B, Sk) < 0.7 if draw(st.booleans()) else None
    q, k, v = tensors(B, HKV * G, HKV, Sq, Sk, D, Dv, seed=draw(st.integers(0, 9)))
    bounds = (window - 1, None) if isinstance(window, int) else window
    see = seen(B, HKV * G, Sq, Sk, causal=causal or isinstance(window, int), window=bounds, keys=keys)
    full_bias = None if bias is None else bias.expand(B, -1, -1, -1)
    ref = truth(q, k, v, see=see, scale=scale, softcap=softcap, bias=full_bias, sinks=sinks)
    given = keys if keys is None or B != Sq else keys[:, None, None]  # else it could be [Sq, Sk]
    out = attention(
        q, k, v, mask=given, causal=causal, window=window, scale=scale, softcap=softcap, sinks=sinks, bias=bias
    )
    torch.testing.assert_close(out.double(), ref, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("HQ", "HKV"), [(4, 4), (8, 2), (6, 1), (12, 3)])
@pytest.mark.parametrize("D", [32, 59, 128])
@pytest.mark.parametrize(("Sq", "Sk"), [(1, 1), (3, 3), (1, 339), (60, 103), (33, 3)])
def test_low_precision_conforms(dtype, HQ, HKV, D, Sq, Sk):
    q, k, v = tensors(2, HQ, HKV, Sq, Sk, D, dtype=dtype)
    out = attention(q, k, v, causal=True)
    ref = attention(q.double(), k.double(), v.double(), causal=True, backend="reference")
    scores = (q @ k.repeat_interleave(HQ // HKV, 1).mT) / math.sqrt(D)
    see = seen(2, HQ, Sq, Sk, causal=True)
    p = torch.softmax(scores.masked_fill(~see, -torch.inf), -1).nan_to_num(0)
    assert_conforms(out, p @ v.repeat_interleave(HQ // HKV, 1), ref)


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"sinks": True}, {"bias": True}, {"window": 3}])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(options, causal):
    q, k, v = (t.double().requires_grad_() for t in tensors(2, 4, 2, 5, 5, 8))
    inputs = [q, k, v]
    given_ = dict(options)
    for name, shape in (("sinks", (4,)), ("bias", (1, 4, 5, 5))):
        if given_.pop(name, False):
            given_[name] = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            inputs.append(given_[name])

    def function(*args):
        extra = dict(given_)
        for name, value in zip((n for n in ("sinks", "bias") if n in given_), args[3:], strict=True):
            extra[name] = value
        return attention(*args[:3], causal=causal, **extra)

    assert torch.autograd.gradcheck(function, inputs)


def test_blind_rows_are_zero_and_padding_never_leaks():
    for options in ({}, {"sinks": torch.randn(4)}, {"softcap": 3.0}):
        for Sq in (1, 6):
            q, k, v = tensors(3, 4, 2, Sq, 9, 16)
            keys = torch.ones(3, 9, dtype=torch.bool)
            keys[0, :4], keys[1, 5:], keys[2] = False, False, False
            clean = attention(q, k, v, mask=keys, **options)
            k[~keys[:, None].expand(3, 2, 9)] = float("nan")
            v[~keys[:, None].expand(3, 2, 9)] = float("inf")
            dirty = attention(q, k, v, mask=keys, **options)
            torch.testing.assert_close(dirty, clean)
            assert (dirty[2] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.booleans(), st.sampled_from([None, 2]), st.booleans())
def test_packed_documents_are_alone(lengths, causal, window, tail):
    total = sum(lengths) + (3 if tail else 0)
    if total == 0:
        return
    q, k, v = (t[0].transpose(0, 1) for t in tensors(1, 4, 2, total, total, 8))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    out = attention_varlen(q, k, v, cu, causal=causal, window=window)
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        if b > a:
            one = [t[None, a:b].transpose(1, 2) for t in (q, k, v)]
            alone = attention(*one, causal=causal, window=window, backend="reference")
            torch.testing.assert_close(out[a:b], alone[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
    assert (out[int(cu[-1]) :] == 0).all()
    everything = attention_varlen(q, k, v, cu, causal=causal, window=window, backend="reference")
    torch.testing.assert_close(everything, out, atol=1e-5, rtol=1e-5)


def test_dropout_rate_and_expectation():
    q, k = torch.zeros(1, 2, 64, 8), torch.zeros(1, 1, 512, 8)
    v = torch.ones(1, 1, 512, 8)
    torch.manual_seed(0)
    out = attention(q, k, v, dropout=0.25)
    assert abs(out.mean() - 1) < 0.01  # expectation kept
    # each output is (kept / 512) / 0.75: its variance says the rate
    assert abs(out[..., 0].var() - 0.25 / (512 * 0.75)) < 2e-4


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"k": (2, 3, 9, 16), "v": (2, 3, 9, 16)}, GroupingError),
        ({"k": (1, 2, 9, 16), "v": (1, 2, 9, 16)}, AttentionError),
        ({"v": (2, 2, 8, 16)}, AttentionError),
        ({"mask": torch.ones(7, 7, dtype=torch.bool)}, AttentionError),
        ({"mask": torch.ones(5, 9, dtype=torch.int64)}, AttentionError),
        ({"sinks": torch.ones(3)}, AttentionError),
        ({"window": 0}, AttentionError),
        ({"dropout": 1.5}, AttentionError),
        ({"backend": "nonesuch"}, AttentionError),
        ({"backend": "flash4"}, AttentionError),
        ({"q_dtype": torch.float16}, AttentionError),
    ],
)
def test_bad_input_is_named(change, error):
    q = torch.randn(2, 4, 5, 16).to(change.pop("q_dtype", torch.float32))
    k, v = (torch.randn(change.pop(n, (2, 2, 9, 16))) for n in "kv")
    with pytest.raises(error) as caught:
        attention(q, k, v, **change)
    assert len(str(caught.value)) > 20


def test_packed_sinks_that_do_not_fit_are_named():
    q, cu = torch.randn(3, 4, 8), torch.tensor([0, 3])
    with pytest.raises(AttentionError, match="not one for each of 4 query heads"):
        attention_varlen(q, q, q, cu, sinks=torch.zeros(2))


def test_use_backend_insists_and_lets_go():
    q, k, v = tensors(1, 4, 2, 5, 5, 8)
    with hf_attn_patch.use_backend("torch_sdpa"), pytest.raises(AttentionError, match="softcap"):
        attention(q, k, v, softcap=3.0)
    attention(q, k, v, softcap=3.0)


@settings(max_examples=25, deadline=None)
@given(
    Sq=st.integers(20, 80), more=st.sampled_from([0, 1, 7]), left=st.integers(0, 6),
    right=st.sampled_from([None, 0, 2]), G=st.sampled_from([1, 2]), sinks=st.booleans(),
)  # fmt: skip
def test_a_long_sequence_behind_a_short_window_is_done_in_blocks(Sq, more, left, right, G, sinks):
    """The CPU kernel takes a block of queries with the keys that it reaches; as one band of Sq x Sk, with gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, S, 8, dtype=torch.float64, generator=generator).requires_grad_(not sinks)
        for heads, S in ((2 * G, Sq), (2, Sq + more), (2, Sq + more))
    )
    options: dict[str, Any] = {"window": (left, right), "causal": right is None}
    if sinks:
        options["sinks"] = torch.randn(2 * G, dtype=torch.float64, generator=generator)
    calls = []

    def watched(*arguments):
        calls.append(arguments[3].queries)
        return _blocks.in_blocks(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blocks, "LEAST", 16)
        patch.setattr(_blocks, "SHORTEST", 4)
        patch.setattr(torch_sdpa, "in_blocks", watched)
        got = attention(q, k, v, **options, backend="torch_sdpa")
    want = attention(q, k, v, **options, backend="reference")
    reach = left + (right or 0)
    assert bool(calls) == (4 * (max(4, reach) + reach) <= min(Sq + more, Sq + left))
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    if not sinks:
        aim = torch.randn(got.shape, dtype=got.dtype, generator=generator)
        for a, b in zip(*(torch.autograd.grad((o * aim).sum(), (q, k, v)) for o in (got, want)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_a_bool_mask_that_could_be_read_in_two_ways_is_refused():
    """[B, Sk] and [Sq, Sk] look the same where B == Sq: neither is guessed, and both can be said."""
    q, k = torch.randn(3, 4, 3, 8), torch.randn(3, 2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]).bool()
    with pytest.raises(AttentionError, match=r"mask\[:, None, None\] or mask\[None, None\]"):
        attention(q, k, k, mask=mask)
    whole = k.repeat_interleave(2, 1)
    for said in (mask[:, None, None], mask[None, None]):
        expected = torch.nn.functional.scaled_dot_product_attention(q, whole, whole, attn_mask=said)
        torch.testing.assert_close(attention(q, k, k, mask=said), expected)
    attention(q[:1, :, :1], k[:1], k[:1], mask=mask[:1])  # one query of one sequence: both readings are one
    attention(q[:, :, :2], k, k, mask=mask)
