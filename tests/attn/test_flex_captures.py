"""What flex attention captures of a bias, where a backward follows: the dtype of the queries, and all of its gradient.

The kernel itself runs on a GPU (tests/gpu/test_bias_gradients.py); a stand-in computes in fp32 here, and adds up what
a captured tensor's elements get in fp32 as Inductor's kernel does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import assert_conforms

from hf_attn_patch.attn.backends import flex
from hf_attn_patch.attn.request import Operands, kind_of, request_of
from hf_attn_patch.attn.visibility import full

HALVES = [torch.bfloat16, torch.float16]


def rows(B, HQ, HKV, S, D, dtype):
    """q, k, v and the gradient of the output."""
    g = torch.Generator().manual_seed(0)
    shapes = ((B, HQ, S, D), (B, HKV, S, D), (B, HKV, S, D), (B, HQ, S, D))
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def plain(q, k, v, bias):
    """Attention as it is written down, in the dtype of the queries."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias.to(q.dtype), -1) @ v


class Gathered(torch.autograd.Function):
    """``tensor[index]``, whose backward adds up in fp32 and rounds once."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, *index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*index)
        ctx.of = tensor.shape, tensor.dtype
        return tensor[index]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shape, dtype = ctx.of
        index = torch.broadcast_tensors(*ctx.saved_tensors)
        total = torch.zeros(shape).index_put_(index, grads[0].float(), accumulate=True)
        return total.to(dtype), *(None for _ in index)


class Captured:
    """A bias in the place of the one that flex would capture."""

    def __init__(self, bias: torch.Tensor) -> None:
        self.bias = bias
        self.shape = bias.shape

    def __getitem__(self, index: tuple[torch.Tensor, ...]) -> torch.Tensor:
        gathered: torch.Tensor = Gathered.apply(self.bias, *index)
        return gathered


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What flex captures, in the order of the calls."""
    seen: list[torch.Tensor] = []

    def cut_bias(layout: Any, bias: torch.Tensor) -> Any:
        seen.append(bias)
        return Captured(bias)

    def kernel(q: Any, k: Any, v: Any, score_mod: Any, block_mask: Any, scale: float, **_: Any) -> Any:
        G = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(G, 1).float() for t in (k, v))
        scores = q.float() @ k.mT * scale
        places = [torch.arange(n).view([-1 if d == at else 1 for d in range(4)]) for at, n in enumerate(scores.shape)]
        scores = score_mod(scores, *places)
        return (torch.softmax(scores, -1) @ v).to(q.dtype), torch.logsumexp(scores, -1)

    monkeypatch.setattr(flex, "cut_bias", cut_bias)
    monkeypatch.setattr(flex, "_compiled", lambda: kernel)
    return seen


def run(q: Any, k: Any, v: Any, bias: Any) -> torch.Tensor:
    layout = full(q.shape[2], k.shape[2], False, (None, None), q.shape[0])
    asked = request_of(kind_of(q, k, v, None, None, bias, 0.0, False, False, "flex", layout.facts))
    return flex.run(q, k, v, asked, Operands(layout, q.shape[-1] ** -0.5, bias=bias))[0]


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", HALVES)
def test_in_the_dtype_of_the_queries_where_gradients_are_asked(captured: Any, dtype: Any, given: Any) -> None:
    q, k, v, aim = rows(1, 4, 1, 9, 16, dtype)
    bias = torch.randn(1, 4, 9, 9).to(given)
    run(q, k, v, bias)
    run(q.requires_grad_(), k, v, bias)
    bias.requires_grad_()
    (gradient,) = torch.autograd.grad(run(q.detach(), k, v, bias), bias, aim)
    assert [t.dtype for t in captured] == [given, dtype, dtype]
    assert gradient.dtype == given and gradient.any()


def test_what_hides_a_key_hides_it_in_half_precision(captured: Any) -> None:
    q, k, v, _ = rows(1, 4, 1, 9, 16, torch.float16)
    bias = torch.zeros(1, 4, 9, 9)
    bias[..., 3] = torch.finfo(torch.float32).min
    bias[..., 4] = -torch.inf
    run(q.requires_grad_(), k, v, bias)
    assert captured[0][0, 0, 0, 2:5].tolist() == [0.0, torch.finfo(torch.float16).min, -torch.inf]


@pytest.mark.parametrize("given", ["half", "fp32"])
@pytest.mark.parametrize("shape", [(1, 32), (1, 1), (16, 1), (16, 32)], ids=str)
@pytest.mark.parametrize(("HQ", "HKV"), [(32, 1), (32, 4)])
@pytest.mark.parametrize("dtype", HALVES)
def test_sums_over_heads_and_batch_are_held_to_the_rule(
    captured: Any, dtype: Any, HQ: int, HKV: int, shape: tuple[int, int], given: str
) -> None:
    *inputs, aim = rows(16, HQ, HKV, 24, 16, dtype)
    bias = torch.randn(*shape, 24, 24)
    inputs.append(bias if given == "fp32" else bias.to(dtype))
    results = []
    for function, wide in ((run, False), (plain, False), (plain, True)):
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in inputs]
        q, k, v, added = leaves
        out = function(q, k, v, bias=added)
        results.append((out, *torch.autograd.grad(out, leaves, aim.to(out.dtype))))
    for mine, low, truth in zip(*results, strict=True):
        assert_conforms(mine, low, truth)
