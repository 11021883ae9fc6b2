"""The chunked loss against the textbook formula on whole fp64 logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import assert_conforms
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_patch.losses.chunked import IGNORE, Head, linear_loss


def plain_loss(hidden, head, labels, teacher, ce, kl, tau):
    """Whole logits, torch's own cross_entropy and kl_div."""

    def logits(h, w, b, scale, cap):
        z = scale * (h @ w.T) + (0 if b is None else b)
        return cap * torch.tanh(z / cap) if cap else z

    valid = labels != IGNORE
    z = logits(hidden, *head)[valid]
    loss = ce * F.cross_entropy(z, labels[valid], reduction="sum")
    if teacher is not None:
        t = logits(*teacher)[valid]
        kl_sum = F.kl_div((z / tau).log_softmax(-1), (t / tau).log_softmax(-1), log_target=True, reduction="sum")
        loss = loss + kl * tau**2 * kl_sum
    return loss


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 20), E=st.integers(1, 8), V=st.integers(2, 30), chunk=st.integers(1, 25),
    ce=st.sampled_from([0.0, 0.5, 1.0]), kl=st.sampled_from([0.0, 1.0, 2.0]), tau=st.sampled_from([1.0, 2.5]),
    bias=st.booleans(), scale=st.sampled_from([1.0, 0.25]), cap=st.sampled_from([None, 3.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_plain_formula(T, E, V, chunk, ce, kl, tau, bias, scale, cap, seed):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(T, E, requires_grad=True), torch.randn(V, E, requires_grad=True)
    b = torch.randn(V, requires_grad=True) if bias else None
    labels = torch.randint(0, V, (T,)).masked_fill(torch.rand(T) < 0.3, IGNORE)
    teacher_hidden, teacher_weight = torch.randn(T, E + 1), torch.randn(V, E + 1)

    sums = linear_loss(
        hidden, Head(weight, b, scale, cap), labels, teacher_hidden=teacher_hidden, teacher_head=Head(teacher_weight),
        ce_weight=ce, kl_weight=kl, temperature=tau, chunk=chunk,
    )  # fmt: skip
    leaves = [hidden, weight] + ([] if b is None else [b])
    grads = torch.autograd.grad(3.0 * sums.loss, leaves)

    doubles = [x.detach().double().requires_grad_() for x in leaves]
    teacher = (teacher_hidden.double(), teacher_weight.double(), None, 1.0, None)
    head = (doubles[1], doubles[2] if bias else None, scale, cap)
    expected = plain_loss(doubles[0], head, labels, teacher, ce, kl, tau)
    wanted = torch.autograd.grad(3.0 * expected, doubles)
    torch.testing.assert_close(sums.loss.double(), expected, rtol=2e-5, atol=2e-5)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    assert int(sums.labels) == int((labels != IGNORE).sum())


def test_bf16_conforms():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), torch.randn(100, 32) / 5
    labels = torch.randint(0, 100, (64,))
    grads = {}
    for name, dtype in (("out", torch.bfloat16), ("low", torch.bfloat16), ("ref", torch.float64)):
        h, w = hidden.bfloat16().to(dtype).requires_grad_(), weight.bfloat16().to(dtype).requires_grad_()
        if name == "out":
            linear_loss(h, Head(w), labels, chunk=7).loss.backward()
        else:
            F.cross_entropy((h @ w.T).float() if name == "low" else h @ w.T, labels, reduction="sum").backward()
        grads[name] = (h.grad, w.grad)
    for out, low, ref in zip(*(grads[n] for n in ("out", "low", "ref")), strict=True):
        assert_conforms(out, low, ref, factor=3.0)


def test_autocast_makes_the_products_low_precision_and_keeps_the_gradient_in_fp32():
    # fp32 norms hand over fp32 hidden states; a product over the whole vocabulary in fp32 would cost most of a step
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(100, 32).div(5).requires_grad_()
    labels = torch.randint(0, 100, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        sums = linear_loss(hidden, Head(weight), labels, chunk=9)
    low = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    expected = linear_loss(low[0], Head(low[1]), labels, chunk=9)
    assert torch.equal(sums.loss, expected.loss)
    got = torch.autograd.grad(sums.loss, (hidden, weight))
    wanted = torch.autograd.grad(expected.loss, low)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float(), rtol=2e-2, atol=1e-2)


def test_a_frozen_head_gets_no_gradient_and_logits_are_taken_as_they_are():
    hidden: Any = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(9, 4)
    labels = torch.tensor([1, 2, IGNORE, 0, 8])
    linear_loss(hidden, Head(weight), labels).loss.backward()
    logits: Any = (hidden.detach() @ weight.T).requires_grad_()
    loss = linear_loss(logits, Head(None), labels).loss
    loss.backward()
    torch.testing.assert_close(logits.grad @ weight, hidden.grad)
    assert weight.grad is None
    # a masked row moves nothing, exactly
    assert not hidden.grad[2].any()


def test_no_label_at_all_is_zero_and_not_nan():
    hidden: Any = torch.randn(3, 4, requires_grad=True)
    sums = linear_loss(hidden, Head(torch.randn(9, 4)), torch.full((3,), IGNORE))
    sums.loss.backward()
    assert sums.loss.item() == 0.0
    assert int(sums.labels) == 0
    assert not hidden.grad.any()


def test_logits_never_stand_whole():
    """With one row at a time, nothing of T x V elements is ever made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    T, E, V = 40, 3, 50
    hidden, weight = torch.randn(T, E, requires_grad=True), torch.randn(V, E, requires_grad=True)
    told: dict[str, Any] = {
        "teacher_hidden": torch.randn(T, E),
        "teacher_head": Head(torch.randn(V, E)),
        "kl_weight": 1.0,
    }
    with Largest() as seen:
        linear_loss(hidden, Head(weight), torch.randint(0, V, (T,)), chunk=4, **told).loss.backward()
    assert seen.numel <= 4 * V


def test_a_teacher_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="a teacher of 8 words cannot teach a student of 9"):
        linear_loss(
            torch.randn(3, 4), Head(torch.randn(9, 4)), torch.zeros(3, dtype=torch.long),
            teacher_hidden=torch.randn(3, 4), teacher_head=Head(torch.randn(8, 4)), kl_weight=1.0,
        )  # fmt: skip
