"""Masks and biases that cuDNN adds to the scores: exact, clean, and without a wait for the device."""

from __future__ import annotations

import pytest
import torch
from conformance import assert_conforms

from hf_attn_patch.attn.backends import _sdpa_cuda
from hf_attn_patch.attn.dispatch import attend
from hf_attn_patch.attn.functional import attention
from hf_attn_patch.attn.visibility import Padded, Visibility, full

pytestmark = pytest.mark.gpu


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").bfloat16()


def truth(q, k, v, scores, dtype):
    """Softmax attention in ``dtype``; queries that see nothing give zeros, keys that nobody sees do not count."""
    G = q.shape[1] // k.shape[1]
    q, k, v = (t.to(dtype) for t in (q, k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)))
    s = q @ k.mT * q.shape[-1] ** -0.5 + scores.to(dtype)
    s = s.masked_fill(scores == -torch.inf, -torch.inf)
    p = torch.softmax(s, -1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
    return p @ v


@pytest.fixture
def cudnn(monkeypatch):
    """Count the calls of cuDNN."""
    calls = []
    kernel = _sdpa_cuda.cudnn_attention

    def counted(*args, **kwargs):
        calls.append(args)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(_sdpa_cuda, "cudnn_attention", counted)
    return calls


@pytest.mark.parametrize("shape", [(1, 12), (2, 12), (1, 1), (2, 1)], ids=str)
@pytest.mark.parametrize(("Sq", "Sk"), [(131, 131), (64, 200), (100, 37), (512, 512)], ids=str)
@pytest.mark.parametrize("heads", [(12, 12, 64), (12, 3, 128), (12, 1, 40)], ids=str)
def test_float_masks(heads, Sq, Sk, shape, cudnn):
    """Some queries see nothing, some keys are seen by nobody and hold NaN."""
    HQ, HKV, D = heads
    q, k, v = randn(2, HQ, Sq, D), randn(2, HKV, Sk, D, seed=1), randn(2, HKV, Sk, D, seed=2)
    scores = randn(*shape, Sq, Sk, seed=3)
    scores[:, :, 5:7] = -torch.inf
    scores[..., 3] = scores[..., Sk - 4] = -torch.inf
    low, ref = (truth(q, k, v, scores, dtype) for dtype in (torch.bfloat16, torch.float32))
    k[:, :, 3] = v[:, :, 3] = float("nan")
    v[:, :, Sk - 4] = float("inf")
    outs = []
    for _ in range(3):  # the second and third find what the first worked out
        outs.append(attention(q, k, v, mask=scores))
        torch.cuda.synchronize()
    assert len(cudnn) == 3
    for out in outs:
        assert_conforms(out, low, ref)
        assert torch.equal(out, outs[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [False, True])
def test_bias_with_padding(causal, side, cudnn):
    q, k, v = (randn(3, 8, 200, 64, seed=i) for i in range(3))
    bias = randn(1, 8, 200, 200, seed=4)
    length = torch.tensor([200, 77, 1], device="cuda", dtype=torch.int32)
    first = 200 - length if side == "left" else torch.zeros_like(length)
    j = torch.arange(200, device="cuda")
    see = ((j >= first[:, None]) & (j < (first + length)[:, None]))[:, None, None, :]
    see = see & (j[:, None] >= j) if causal else see.expand(3, 1, 200, 200)
    scores = bias.masked_fill(~see, -torch.inf)
    low, ref = (truth(q, k, v, scores, dtype) for dtype in (torch.bfloat16, torch.float32))
    dirty_k, dirty_v = (t.masked_fill(~see.any(2)[..., None], float("nan")) for t in (k, v))
    layout = Padded(3, 200, 200, causal, first=first, length=length)
    out = attend(q, dirty_k, dirty_v, layout, bias=bias)[0]
    assert len(cudnn) == 1
    assert_conforms(out, low, ref)


def test_a_bias_that_is_changed_is_worked_out_anew():
    q = randn(1, 4, 64, 64)
    bias = randn(1, 4, 64, 64, seed=1)
    attention(q, q, q, bias=bias)
    bias[..., 8:] = -torch.inf
    bias[:, :, 3] = -torch.inf
    out = attention(q, q, q, bias=bias)
    low, ref = (truth(q, q, q, bias, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert_conforms(out, low, ref)


def test_a_graph_works_out_the_mask_at_replay():
    q = randn(1, 4, 64, 64)
    bias = randn(1, 4, 64, 64, seed=1)
    attention(q, q, q, bias=bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, q, q, bias=bias)
    bias[..., 8:] = -torch.inf
    bias[:, :, 3] = -torch.inf
    graph.replay()
    low, ref = (truth(q, q, q, bias, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert_conforms(out, low, ref)


def test_the_gradient_of_a_bias_is_exact():
    q, k, v = (randn(2, 4, 96, 64, seed=i).requires_grad_() for i in range(3))
    bias = randn(1, 4, 96, 96, seed=4).requires_grad_()
    grad = randn(2, 4, 96, 64, seed=5)
    found = torch.autograd.grad(attention(q, k, v, bias=bias), (q, k, v, bias), grad)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        wide = [t.detach().to(dtype).requires_grad_() for t in (q, k, v, bias)]
        p = torch.softmax(wide[0] @ wide[1].mT * 0.125 + wide[3], -1)
        results.append(torch.autograd.grad(p @ wide[2], wide, grad.to(dtype)))
    low, ref = results
    for mine, small, true in zip(found, low, ref, strict=True):
        assert_conforms(mine, small, true, factor=3.0)


def test_no_wait_for_the_device():
    q, bias = randn(2, 4, 128, 64), randn(1, 4, 128, 128)
    attention(q, q, q, bias=bias)
    fresh = bias + 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, q, q, bias=fresh)
        attention(q, q, q, bias=fresh)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("S", [17, 168, 333])
@pytest.mark.parametrize("heads", [(12, 12), (12, 3)])
def test_small_work_goes_to_torch(S, heads):
    q, k, v = randn(2, heads[0], S, 64), *(randn(2, heads[1], S, 64, seed=i) for i in (1, 2))
    out = attention(q, k, v, causal=True)
    band = torch.zeros(S, S, device="cuda").masked_fill(~torch.ones(S, S, device="cuda").tril().bool(), -torch.inf)
    low, ref = (truth(q, k, v, band[None, None], dtype) for dtype in (torch.bfloat16, torch.float32))
    assert_conforms(out, low, ref)


@pytest.mark.parametrize("Sq", [9, 16])
@pytest.mark.parametrize("pad", ["", "left"])
def test_many_rows_over_many_heads(Sq, pad):
    """The shape that goes to FlashAttention-4 where it is installed."""
    q, k, v = randn(16, 32, Sq, 128), *(randn(16, 8, 999, 128, seed=i) for i in (1, 2))
    first = torch.arange(16, device="cuda", dtype=torch.int32) * (20 if pad else 0)
    layout: Visibility = full(Sq, 999, True, (None, None), 16)
    if pad:
        layout = Padded(16, Sq, 999, True, first=first, length=999 - first)
    j = torch.arange(999, device="cuda")
    see = (j[None] <= torch.arange(Sq, device="cuda")[:, None] + 999 - Sq) & (j >= first[:, None, None])
    scores = torch.zeros(16, 1, Sq, 999, device="cuda").masked_fill(~see[:, None], -torch.inf)
    low, ref = (truth(q, k, v, scores, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert_conforms(attend(q, k, v, visibility=layout)[0], low, ref)
