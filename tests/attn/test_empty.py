"""Calls without a batch, queries, keys, tokens or documents: what torch's function gives, forward and backward."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conformance import assert_conforms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hf_attn_patch import AttentionError, attention, attention_varlen
from hf_attn_patch.hf.attention_function import attention_forward
from hf_attn_patch.losses.chunked import Head, linear_loss
from hf_attn_patch.modeling import GroupedQueryAttention

EMPTY = [s for s in itertools.product((0, 2), (0, 1, 5), (0, 1, 7)) if 0 in s]
OPTIONS = ["causal", "window", "softcap", "sinks", "bias", "dropout", "bool mask", "keys", "float mask"]


def zeros_of(out, shape, leaves):
    """``out`` has the shape and is zero, and so are all gradients."""
    assert out.shape == torch.Size(shape)
    assert not out.any()
    if leaves:
        for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert gradient.shape == leaf.shape
            assert not gradient.any()


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.sampled_from(EMPTY), chosen=st.sets(st.sampled_from(OPTIONS)), grad=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    backend=st.sampled_from([None, "reference"]), HKV=st.sampled_from([4, 2, 1]),
)  # fmt: skip
def test_the_function_with_every_option(sizes, chosen, grad, dtype, backend, HKV):
    (B, Sq, Sk), HQ, D, Dv = sizes, 4, 8, 16

    def made(*shape):
        leaves.append(torch.randn(*shape, dtype=dtype, requires_grad=grad))
        return leaves[-1]

    leaves: list[torch.Tensor] = []
    q, k, v = made(B, HQ, Sq, D), made(B, HKV, Sk, D), made(B, HKV, Sk, Dv)
    options = {"causal": "causal" in chosen, "backend": backend, "dropout": 0.3 if "dropout" in chosen else 0.0}
    options |= {"window": 3} if "window" in chosen else {}
    options |= {"softcap": 2.0} if "softcap" in chosen else {}
    options |= {"sinks": made(HQ)} if "sinks" in chosen else {}
    options |= {"bias": made(1, HQ, Sq, Sk)} if "bias" in chosen else {}
    masks = {
        "bool mask": torch.ones(B, HQ, Sq, Sk, dtype=torch.bool),
        "keys": torch.zeros(B, Sk, dtype=torch.bool),
        "float mask": torch.zeros(Sq, Sk, dtype=dtype),
    }
    for name in chosen & masks.keys():
        options["mask"] = masks[name]
    for _ in range(2):  # the second call finds what the first left
        zeros_of(attention(q, k, v, **options), (B, HQ, Sq, Dv), leaves if grad else [])
    stock = F.scaled_dot_product_attention(q, *(t.repeat_interleave(HQ // HKV, 1) for t in (k, v)))
    zeros_of(stock, (B, HQ, Sq, Dv), [])


@pytest.mark.parametrize(
    ("borders_q", "borders_k"),
    [([0], None), ([0, 0], None), ([0, 0, 0], [0, 2, 4]), ([0, 2, 4], [0, 0, 0]), ([0, 2, 2, 5], [0, 3, 4, 4])],
    ids=str,
)
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": 2}, {"softcap": 2.0}, {"sinks": 4}, {"dropout": 0.5}]
)
def test_packed_documents_of_no_tokens(borders_q, borders_k, tail, options):
    T, Tk = borders_q[-1] + tail, (borders_k or borders_q)[-1] + tail
    leaves = [torch.randn(n, h, 8, dtype=torch.float64, requires_grad=True) for n, h in ((T, 4), (Tk, 2), (Tk, 2))]
    if "sinks" in options:
        options = {"sinks": torch.randn(4, dtype=torch.float64, requires_grad=True)}
        leaves.append(options["sinks"])
    cu_q, cu_k = (None if b is None else torch.tensor(b, dtype=torch.int32) for b in (borders_q, borders_k))
    assert cu_q is not None
    out = attention_varlen(leaves[0], leaves[1], leaves[2], cu_q, cu_k, **options)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (T, 4, 8)
    q, k, v = leaves[:3]
    want = torch.zeros(T, 4, 8, dtype=torch.float64)
    for a, b, c, d in zip(borders_q, borders_q[1:], borders_k or borders_q, (borders_k or borders_q)[1:], strict=False):
        if a < b and c < d and "dropout" not in options:
            one = [t[None, x:y].transpose(1, 2) for t, x, y in ((q, a, b), (k, c, d), (v, c, d))]
            want[a:b] = attention(*one, **options)[0].transpose(0, 1)
        elif a < b and c == d:
            assert not out[a:b].any()
    if "dropout" not in options:
        torch.testing.assert_close(out, want.detach())
        wanted = torch.autograd.grad(want.sum(), leaves, allow_unused=True) if want.requires_grad else [None] * 9
        for got, right, leaf in zip(gradients, wanted, leaves, strict=False):
            torch.testing.assert_close(got, torch.zeros_like(leaf) if right is None else right)


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
@pytest.mark.parametrize(
    "option", ["mask", "float mask", "positions", "position_bias", "s_aux", "softcap", "sliding_window", "weights"]
)
def test_the_function_of_transformers(sizes, option):
    B, Sq, Sk = sizes
    q, k, v = leaves = [torch.randn(B, h, s, 8, requires_grad=True) for h, s in ((4, Sq), (2, Sk), (2, Sk))]
    of_options: dict[str, dict[str, Any]] = {
        "positions": {"position_ids": torch.arange(Sq).expand(B, -1)},
        "position_bias": {"position_bias": torch.randn(1, 4, Sq, Sk, requires_grad=True)},
        "s_aux": {"s_aux": torch.randn(4, requires_grad=True)},
        "softcap": {"softcap": 3.0},
        "sliding_window": {"sliding_window": 2},
        "weights": {"output_attentions": True},
    }
    more = of_options.get(option, {})
    mask = torch.ones(B, 1, Sq, Sk, dtype=torch.bool) if option == "mask" else None
    mask = torch.zeros(B, 1, Sq, Sk) if option == "float mask" else mask
    leaves += [t for t in more.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    module: Any = nn.Module()
    module.is_causal, module.layer_idx = True, 0
    out, weights = attention_forward(module, q, k, v, mask, **more)
    zeros_of(out, (B, Sq, 4, 8), leaves)
    assert (weights is None) == (option != "weights")
    assert weights is None or weights.shape == (B, 4, Sq, Sk)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 2}, {"sinks": True}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize(("B", "Sq", "Sk"), EMPTY)
def test_the_module(options, B, Sq, Sk):
    module = GroupedQueryAttention(16, 4, 2, bias=True, **options)
    x: Any = torch.randn(B, Sq, 16, requires_grad=True)
    source: Any = torch.randn(B, Sk, 16, requires_grad=True)
    out = module(x, source, attention_mask=torch.ones(B, Sk, dtype=torch.long))
    torch.testing.assert_close(out, module.o_proj.bias.expand(B, Sq, 16))
    out.sum().backward()
    assert not x.grad.any()
    assert not source.grad.any()
    if 0 in (B, Sq):
        assert module(x).shape == (B, Sq, 16)


def test_the_module_over_packed_documents_of_no_tokens():
    module = GroupedQueryAttention(16, 4, 2, causal=True)
    assert module(torch.randn(1, 0, 16), cu_seqlens=torch.tensor([0, 0])).shape == (1, 0, 16)
    x = torch.randn(1, 3, 16)
    torch.testing.assert_close(module(x, cu_seqlens=torch.tensor([0, 0, 3, 3])), module(x))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_the_loss_of_no_tokens_is_zero(chunk, kl):
    leaves = [torch.randn(0, 4), torch.randn(7, 4), torch.randn(7)]
    hidden, weight, bias = (t.requires_grad_() for t in leaves)
    teacher: dict[str, Any] = {"teacher_hidden": torch.randn(0, 3), "teacher_head": Head(torch.randn(7, 3))}
    sums = linear_loss(
        hidden, Head(weight, bias), torch.zeros(0, dtype=torch.long), kl_weight=kl, chunk=chunk, **teacher
    )
    zeros_of(torch.stack(sums[:3]), (3,), [])
    assert sums.labels == 0
    for leaf, gradient in zip(leaves, torch.autograd.grad(sums.loss, leaves), strict=True):
        assert_conforms(gradient, leaf * 0, leaf * 0)


@pytest.mark.parametrize("most", [(None, None), (9, 9)], ids=str)
@pytest.mark.parametrize(
    ("borders", "said"),
    [([2, 5, 9], "from 2 to 9"), ([0, 5, 12], "from 0 to 12"), ([0, 7, 4, 9], "not ascending"), ([-1, 9], "from -1")],
    ids=str,
)
def test_borders_that_are_none_are_refused(borders, said, most):
    """Tokens before the first border had attended to one another, or ended in an error of torch's."""
    t = torch.randn(9, 4, 8)
    good = torch.tensor([*range(len(borders) - 1), 9])
    with pytest.raises(AttentionError, match=f"cu_seqlens_q.*{said}"):
        attention_varlen(t, t, t, torch.tensor(borders), None, *most)
    with pytest.raises(AttentionError, match=f"cu_seqlens_k.*{said}"):
        attention_varlen(t, t, t, good, torch.tensor(borders), *most)
    assert attention_varlen(t, t, t, good, None, *most).isfinite().all()
