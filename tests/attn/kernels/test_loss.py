"""The loss kernel against its plain truth and against torch's own losses, by Triton's interpreter without a GPU."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest
import torch
import torch.nn.functional as F
from conformance import assert_conforms
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from hf_attn_patch.attn.kernels import loss as kernel
from hf_attn_patch.losses import chunked as losses
from hf_attn_patch.losses.chunked import IGNORE, Head, linear_loss

DEVICE = interpreter.DEVICE
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def textbook(x, head, labels, teacher, teacher_head, weights):
    """[CE, tau^2 KL] and the gradient of their weighted sum, by autograd through torch's own losses in fp64."""
    x = x.detach().double().requires_grad_()
    ce_weight, kl_weight, tau = weights
    double = [Head(None, None if h.bias is None else h.bias.double(), h.scale, h.softcap) for h in (head, teacher_head)]
    z, t = (finish(h, v) for h, v in zip(double, (x, teacher.double()), strict=True))
    valid = labels != IGNORE
    ce = F.cross_entropy(z[valid], labels[valid], reduction="sum")
    p = (t[valid] / tau).softmax(-1)
    log_ratio = (t[valid] / tau).log_softmax(-1) - (z[valid] / tau).log_softmax(-1)
    kl = tau**2 * torch.where(p > 0, p * log_ratio.masked_fill(p == 0, 0.0), 0.0).sum()
    (grad,) = torch.autograd.grad(ce_weight * ce + kl_weight * kl, x)
    return torch.stack([ce, kl]).detach(), grad


def finish(head: Head, x):
    z = head.scale * x + (0 if head.bias is None else head.bias)
    return head.softcap * torch.tanh(z / head.softcap) if head.softcap else z


def both(x, head, labels, teacher, teacher_head, weights, wanted=True) -> list[Any]:
    told = (teacher, teacher_head)
    plain = losses._plain_chunk(x.clone(), head, labels, told, weights, wanted)
    return [losses._fused_chunk(x.clone(), head, labels, told, weights, wanted), plain]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(1, 6), V=st.sampled_from([2, 3, 17, 64, 100, 129, 300]), block=st.sampled_from([16, 64, 4096]),
    ce=st.sampled_from([0.0, 0.5, 1.0]), kl=st.sampled_from([0.0, 1.0, 2.0]), tau=st.sampled_from([1.0, 2.5]),
    bias=st.booleans(), scale=st.sampled_from([1.0, 0.25]), cap=st.sampled_from([None, 3.0]),
    labelled=st.sampled_from([0.0, 0.6, 1.0]), ruled_out=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_conforms(dtype, T, V, block, ce, kl, tau, bias, scale, cap, labelled, ruled_out, seed):
    torch.manual_seed(seed)
    x, teacher = (3 * torch.randn(T, V)).to(DEVICE, dtype), (3 * torch.randn(T, V)).to(DEVICE, dtype)
    if ruled_out:  # words that the teacher's head forbids
        teacher[:, ::3] = float("-inf")
        teacher[:, 1] = 0.0
    labels = torch.randint(0, V, (T,)).masked_fill(torch.rand(T) >= labelled, IGNORE).to(DEVICE)
    head = Head(torch.empty(0), torch.randn(V).to(DEVICE, dtype) if bias else None, scale, cap)
    teacher_head, weights = Head(None, head.bias, 0.5, None if cap is None else 2.0), (ce, kl, tau)
    before = kernel.BLOCK
    kernel.BLOCK = block
    try:
        (sums, grad), (low_sums, low) = both(x, head, labels, teacher, teacher_head, weights)
        unwanted = losses._fused_chunk(x.clone(), head, labels, (teacher, teacher_head), weights, False)
    finally:
        kernel.BLOCK = before
    ref_sums, ref = textbook(x, head, labels, teacher, teacher_head, weights)
    assert grad.dtype == dtype
    assert_conforms(grad, low, ref)
    torch.testing.assert_close(sums.double(), ref_sums, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(sums, low_sums, rtol=2e-5, atol=2e-5)
    assert not grad[labels == IGNORE].any()
    assert unwanted[1] is None
    torch.testing.assert_close(unwanted[0], sums)


def test_the_whole_loss_with_the_kernel_is_the_whole_loss_without(monkeypatch):
    """Through the chunks of ``linear_loss``: gradients of hidden states, head and bias."""
    torch.manual_seed(0)
    leaves = [torch.randn(23, 8), torch.randn(50, 8), torch.randn(50)]
    teacher: dict[str, Any] = {
        "teacher_hidden": torch.randn(23, 4).to(DEVICE),
        "teacher_head": Head(torch.randn(50, 4).to(DEVICE)),
    }
    labels = torch.randint(0, 50, (23,)).masked_fill(torch.rand(23) < 0.3, IGNORE).to(DEVICE)
    found = []
    for fused in (losses._plain_chunk, losses._fused_chunk):
        monkeypatch.setattr(losses, "_plain_chunk", fused)
        monkeypatch.setattr(losses, "HAS_TRITON", False)
        h, w, b = (x.to(DEVICE).requires_grad_() for x in leaves)
        sums = linear_loss(h, Head(w, b, 0.5, 4.0), labels, kl_weight=0.7, temperature=2.0, chunk=7, **teacher)
        found.append((sums.loss, sums.ce, sums.kl, *torch.autograd.grad(sums.loss, (h, w, b))))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_logits_that_are_the_callers_are_not_written_over():
    x = torch.randn(4, 30, device=DEVICE)
    kept = x.clone()
    labels = torch.tensor([1, 2, IGNORE, 0], device=DEVICE)
    _, grad = losses._fused_chunk(x, Head(None), labels, None, (1.0, 0.0, 1.0), True)
    assert grad is not None
    assert torch.equal(x, kept)
    assert_conforms(grad, *(F.softmax(x.to(d), -1).index_put_((torch.arange(4), labels.clamp(min=0)),
        F.softmax(x.to(d), -1)[torch.arange(4), labels.clamp(min=0)] - 1).masked_fill((labels == IGNORE)[:, None], 0)
        for d in (torch.float32, torch.float64)))  # fmt: skip


@pytest.mark.parametrize("spoiled", ["nan in the student", "nan in the teacher", "label beyond the vocabulary"])
def test_what_is_wrong_shows_in_the_loss_and_in_its_row_alone(spoiled):
    torch.manual_seed(0)
    x, teacher = torch.randn(3, 40, device=DEVICE), torch.randn(3, 40, device=DEVICE)
    labels = torch.tensor([1, 2, 3], device=DEVICE)
    if spoiled == "nan in the student":
        x[1, 5] = float("nan")
    elif spoiled == "nan in the teacher":
        teacher[1, 5] = float("nan")
    else:
        labels[1] = 40
    told = (teacher, Head(None))
    sums, grad = losses._fused_chunk(x, Head(None), labels, told, (1.0, 1.0, 1.0), True)
    assert not sums.isfinite().all()
    assert grad is not None
    assert grad[[0, 2]].isfinite().all()
    # a row that does not count may hold anything
    labels[1] = IGNORE
    sums, grad = losses._fused_chunk(x, Head(None), labels, told, (1.0, 1.0, 1.0), True)
    assert grad is not None
    assert sums.isfinite().all() and grad.isfinite().all()


def test_rows_that_do_not_lie_together_are_refused():
    x = torch.randn(30, 4, device=DEVICE).T
    with pytest.raises(ValueError, match=r"\[4, 30\] with contiguous rows"):
        kernel.rows_loss(kernel.RawLogits(x), torch.zeros(4, dtype=torch.long), None, (1.0, 0.0, 1.0), IGNORE, None)
