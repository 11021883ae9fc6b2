"""Keys that nobody sees may hold NaN or infinity: output and gradients are those of clean ones, and zero there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_attn_patch import attention, attention_varlen
from hf_attn_patch.attn import functional, memo
from hf_attn_patch.attn.backends._unseen import peaks_of
from hf_attn_patch.attn.backends._varlen import run_varlen
from hf_attn_patch.attn.dispatch import attend
from hf_attn_patch.attn.request import Operands
from hf_attn_patch.attn.visibility import Packed, Padded, packed
from hf_attn_patch.hf.attention_function import attention_forward

SPOILT = torch.tensor([float("nan"), float("inf"), float("-inf")])


def spoil(t, unseen, seed=0):
    """``t`` [B, HKV, Sk, D] with NaN and infinities where ``unseen`` [B, HKV, Sk]."""
    values = SPOILT[torch.randint(3, t.shape, generator=torch.Generator().manual_seed(seed))].to(t.dtype)
    return torch.where(unseen[..., None], values, t)


def assert_unharmed(function, q, k, v, unseen, others=(), grad=True):
    """``function`` gives the same with spoilt keys, forward and backward."""
    results = []
    for keys, values in ((k, v), (spoil(k, unseen), spoil(v, unseen, 1))):
        leaves = [t.detach().clone().requires_grad_(grad) for t in (q, keys, values, *others)]
        torch.manual_seed(0)  # dropout
        out = function(*leaves)
        aim = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
        results.append((out, *(torch.autograd.grad(out, leaves, aim) if grad else ())))
    for clean, dirty in zip(*results, strict=True):
        assert dirty.isfinite().all()
        torch.testing.assert_close(dirty, clean)
    if grad:
        assert not results[1][2][unseen].any()
        assert not results[1][3][unseen].any()


def nobody(see, HKV):
    """Bool [B, HKV, Sk] of a mask [B, HQ, Sq, Sk]: no query of the KV head looks."""
    return ~see.unflatten(1, (HKV, -1)).any(2).any(2)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["bool", "-inf", "lowest", "bias -inf", "bias and bool", "wide lowest"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    HKV=st.sampled_from([4, 2, 1]), Sq=st.sampled_from([1, 3, 8]), Sk=st.sampled_from([3, 8, 11]),
    heads=st.booleans(), rows=st.booleans(), causal=st.booleans(), window=st.sampled_from([None, (3, 1)]),
    extra=st.sampled_from(["", "softcap", "sinks", "dropout"]), grad=st.booleans(), seed=st.integers(0, 999),
    backend=st.sampled_from([None, "reference"]),
)  # fmt: skip
def test_whatever_hides_them(kind, dtype, HKV, Sq, Sk, heads, rows, causal, window, extra, grad, seed, backend):
    B, HQ, D = 2, 4, 8
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, s, D, generator=g).to(dtype) for h, s in ((HQ, Sq), (HKV, Sk), (HKV, Sk)))
    see = torch.rand(B, HQ if heads else 1, Sq if rows else 1, Sk, generator=g) < 0.5
    band = torch.ones(Sq, Sk, dtype=torch.bool)
    if causal:
        band = band.tril(Sk - Sq)
    if window:
        band = band & ~band.new_ones(Sq, Sk).tril(Sk - Sq - 4) & band.new_ones(Sq, Sk).tril(Sk - Sq + 1)
    if "lowest" in kind:  # a row that sees no other key has the mean of all, which is not for this test
        see = see | band.cumsum(-1).eq(1) if rows else see | (torch.arange(Sk) >= 0)
        see[..., :1] = True
        band[:, 0] = True
        if window or (causal and Sk < Sq):
            return
    seen = see.expand(B, HQ, Sq, Sk) & band
    number = {"lowest": torch.finfo(dtype).min, "wide lowest": torch.finfo(torch.float64).min}.get(kind, -torch.inf)
    wide = torch.float64 if kind == "wide lowest" else dtype
    added = torch.zeros(see.shape, dtype=wide).masked_fill(~see, number)
    options = {"causal": causal, "window": window, "backend": backend}
    if kind == "bool":
        options["mask"] = see
    elif kind == "bias and bool":
        half = torch.rand(see.shape, generator=g) < 0.5
        options |= {"mask": see | half, "bias": torch.randn(see.shape, generator=g).to(dtype)}
        options["bias"] = options["bias"].masked_fill(~(see | ~half), -torch.inf)
    elif kind == "bias -inf":
        options["bias"] = torch.randn(see.shape, generator=g).to(dtype) + added
    else:
        options["mask"] = added
    options |= {"softcap": {"softcap": 4.0}, "dropout": {"dropout": 0.3}}.get(extra, {})
    others = (torch.randn(HQ, generator=g).to(dtype),) if extra == "sinks" else ()

    def function(q, k, v, *sinks):
        return attention(q, k, v, sinks=sinks[0] if sinks else None, **options)

    assert_unharmed(function, q, k, v, nobody(seen, HKV), others, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_under_the_lowest_number_alone_has_torchs_mean(dtype):
    q, k, v = (torch.randn(2, h, 6, 8).to(dtype) for h in (4, 4, 4))
    mask = torch.zeros(6, 6, dtype=dtype)
    mask[2] = mask[:, 4:] = torch.finfo(dtype).min
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask.double())
    for backend in (None, "reference"):
        got = attention(q, k, v, mask=mask, backend=backend)
        torch.testing.assert_close(got.double(), want, atol=0.02 if dtype.itemsize == 2 else 1e-5, rtol=0)
    if dtype.itemsize == 2:  # fp32's lowest number is not -inf in half precision
        wide = mask.float().masked_fill(mask < 0, torch.finfo(torch.float32).min)
        got = attention(q, k, v, mask=wide)
        torch.testing.assert_close(got[:, :, 2].double(), v.double().mean(2), atol=0.02, rtol=0)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("added", [None, -torch.inf, torch.finfo(torch.float32).min])
def test_in_a_compiled_graph(mode, added):
    q, k, v = (torch.randn(2, h, 7, 8) for h in (4, 2, 2))
    see = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    see[0, ..., 3:] = False
    mask = see if added is None else torch.zeros(see.shape).masked_fill(~see, added)
    function = lambda q, k, v: attention(q, k, v, mask=mask)  # noqa: E731
    if mode == "compiled":
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_unharmed(function, q, k, v, nobody(see.expand(2, 4, 7, 7), 2))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 3}, {"softcap": 3.0}, {"dropout": 0.2}], ids=str)
def test_outside_every_document(options, backend):
    q, k, v = (torch.randn(1, h, 12, 8) for h in (4, 2, 2))
    unseen = torch.zeros(1, 2, 12, dtype=torch.bool)
    unseen[..., 9:] = True

    def documents(q, k, v):
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        return attention_varlen(q, k, v, torch.tensor([0, 4, 9]), backend=backend, **options)

    assert_unharmed(documents, q, k, v, unseen)


def test_borders_are_read_once(monkeypatch):
    """Layers that are given the same borders share what is known of the documents; a write to them ends that."""
    made = []

    def counted(*a):
        made.append(1)
        return packed(*a)

    monkeypatch.setattr(functional, "packed", counted)
    t, cu = torch.randn(9, 2, 8), torch.tensor([0, 4, 9])
    first = attention_varlen(t, t, t, cu)
    assert torch.equal(attention_varlen(t, t, t, cu), first)
    assert len(made) == 1
    attention_varlen(t, t, t, cu, causal=True)
    attention_varlen(t, t, t, cu, cu.clone())
    assert len(made) == 3
    cu[1] = 2
    torch.testing.assert_close(attention_varlen(t, t, t, cu)[:2], attention_varlen(t[:2], t[:2], t[:2], cu[:2]))


def test_borders_made_in_inference_mode_are_read_anew():
    """They count no writes, and these calls have no layer that says where a forward begins."""
    t = torch.randn(9, 2, 8)
    layer: Any = torch.nn.Module()
    layer.layer_idx = 0
    memo.asks(layer)  # of a model that ran before
    with torch.inference_mode():
        cu = torch.tensor([0, 4, 9])
        attention_varlen(t, t, t, cu)
        cu[1] = 2
        torch.testing.assert_close(attention_varlen(t, t, t, cu)[:2], attention_varlen(t[:2], t[:2], t[:2], cu[:2]))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4),
    tails=st.tuples(*[st.integers(0, 3)] * 2), left=st.sampled_from([None, 0, 2]), causal=st.booleans(),
)  # fmt: skip
def test_which_keys_documents_leave_unseen(lengths, tails, left, causal):
    """Told from the borders, as the whole mask tells it, and kept from a kernel whose tiles reach over them."""
    borders = [torch.tensor([0, *(n[i] for n in lengths)]).cumsum(0) for i in (0, 1)]
    T, Tk = (int(b[-1]) + tail for b, tail in zip(borders, tails, strict=True))
    if 0 in (T, Tk):
        return
    layout = packed(1, T, Tk, borders[0], borders[1], 5, 5, causal, (left, None))
    mask = layout.dense(torch.device("cpu"))
    dead = layout.dead_keys(torch.device("cpu"))
    assert torch.equal(dead, ~mask.any(2))
    q, k, v = (torch.randn(1, h, s, 8) for h, s in ((4, T), (2, Tk), (2, Tk)))

    def tiles(q, k, v, cu_q, cu_k, *_):
        """Scores of a whole row of tokens, hidden before the softmax: 0 * NaN is met in the product with V."""
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)).masked_fill(~mask[0], -torch.inf)
        weights = scores.softmax(-1).masked_fill(~mask[0].any(-1, keepdim=True), 0)
        return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, 1))

    def function(q, k, v):
        return run_varlen(q, k, v, Operands(layout, 1.0), tiles, clean=True)

    assert_unharmed(function, q, k, v, dead.expand(1, 2, Tk))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_between_documents(causal, backend):
    """Padding in a packed batch is a document of its own, whose output is dropped."""
    q, k, v = (torch.randn(2, h, 6, 8) for h in (4, 2, 2))
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    cu = torch.tensor([0, 2, 6, 10, 12], dtype=torch.int32)
    layout = Packed(2, 6, 6, causal, stop=6, cu_q=cu, cu_k=cu, max_q=4, max_k=4, padding=padding)
    unseen = padding[:, None].expand(2, 2, 6)
    assert_unharmed(lambda q, k, v: attend(q, k, v, visibility=layout, name=backend)[0], q, k, v, unseen)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("left", "right"), [(2, None), (2, 0), (1, 1), (None, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_behind_every_window(padded, left, right, backend):
    """Keys that no query reaches back to, with a window on one side or both."""
    Sq, Sk = 3, 11
    q, k, v = (torch.randn(2, h, s, 8) for h, s in ((4, Sq), (2, Sk), (2, Sk)))
    i, j = torch.arange(Sq)[:, None] + Sk - Sq, torch.arange(Sk)
    see = torch.ones(Sq, Sk, dtype=torch.bool)
    see = see if left is None else see & (j >= i - left)
    see = see if right is None else see & (j <= i + right)
    see = see.expand(2, 4, Sq, Sk)
    if not padded:
        unseen = nobody(see, 2)
        assert bool(unseen.any()) == (left is not None)
        assert_unharmed(lambda q, k, v: attention(q, k, v, window=(left, right), backend=backend), q, k, v, unseen)
        return
    first, length = torch.tensor([0, 9], dtype=torch.int32), torch.tensor([10, 2], dtype=torch.int32)
    layout = Padded(2, Sq, Sk, window=(left, right), first=first, length=length)
    see = see & ((j >= first[:, None]) & (j < (first + length)[:, None]))[:, None, None]
    assert_unharmed(lambda q, k, v: attend(q, k, v, visibility=layout, name=backend)[0], q, k, v, nobody(see, 2))


@pytest.mark.parametrize("added", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("more", ["", "position_bias", "s_aux", "softcap"])
def test_through_the_function_of_transformers(added, more):
    q, k, v = (torch.randn(2, h, 5, 8) for h in (4, 2, 2))
    see = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    see[1, ..., 3:] = False
    mask = torch.zeros(see.shape).masked_fill(~see, added)
    others = {"position_bias": (torch.randn(1, 4, 5, 5),), "s_aux": (torch.randn(4),)}.get(more, ())
    module = torch.nn.Module()

    def function(q, k, v, *extra):
        options: dict[str, Any] = {more: extra[0]} if extra else {"softcap": 3.0} if more else {}
        return attention_forward(module, q, k, v, mask, **options)[0]

    assert_unharmed(function, q, k, v, nobody(see.expand(2, 4, 5, 5), 2), others)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_heads_of_a_group_hide_keys_in_two_ways(backend):
    """Of two heads that share keys one is not shown some of them, and the other has them under the lowest number."""
    q, k, v = (torch.randn(1, h, 5, 8) for h in (4, 2, 2))
    bias = torch.randn(1, 4, 5, 5)
    bias[:, 0::2, :, 3:], bias[:, 1::2, :, 3:] = -torch.inf, torch.finfo(torch.float32).min
    unseen = (torch.arange(5) >= 3).expand(1, 2, 5)
    assert_unharmed(lambda q, k, v: attention(q, k, v, mask=bias, backend=backend), q, k, v, unseen)


@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_what_padding_and_a_bias_hide_together(banded, heads):
    """Per row of the batch: without a mask of B x Sq x Sk."""
    first, length = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([7, 6], dtype=torch.int32)
    seen = Padded(2, 6, 9, causal=banded, first=first, length=length)
    bias = torch.randn(1, heads, 6, 9).masked_fill(torch.rand(1, heads, 6, 9) < 0.4, -torch.inf)
    bias[..., 4] = -torch.inf
    mask = seen.dense(torch.device("cpu"))
    want = bias.expand(2, -1, -1, -1).masked_fill(~mask, -torch.inf).amax(2)
    assert torch.equal(peaks_of(seen, bias, torch.device("cpu")), want)
