"""Attention with a bias and its gradient: the kernels against autograd through the formula, by the interpreter."""

from __future__ import annotations

import interpreter
import pytest
import torch
from conformance import assert_conforms
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from hf_attn_patch.attn.kernels import biased
from hf_attn_patch.attn.kernels.biased import Biased, Block, biased_attention

DEVICE = interpreter.DEVICE
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of few numbers: what a GPU has with many."""
    if DEVICE == "cpu":
        for i, name in enumerate(biased.BLOCKS):
            monkeypatch.setitem(biased.BLOCKS, name, dict.fromkeys((64, 128), Block(16 << i % 2, 32 >> i % 2, 4, 1)))


def seen_by(call, B, Sq, Sk):
    """Bool [B, 1, Sq, Sk], written out."""
    j, i = torch.arange(Sk, device=DEVICE), torch.arange(Sq, device=DEVICE)[:, None]
    own = i + Sk - Sq
    left, right = call.sides
    seen = torch.ones(B, 1, Sq, Sk, dtype=torch.bool, device=DEVICE)
    if left is not None:
        seen &= j >= own - left
    if right is not None:
        seen &= j <= own + right
    if call.first is not None:
        seen &= (j >= call.first.view(-1, 1, 1, 1)) & (j < call.end.view(-1, 1, 1, 1))
    return seen if call.mask is None else seen & call.mask


def textbook(q, k, v, bias, call, kept=None):
    G = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(G, 1) for t in (k, v))
    scores = q @ k.mT * call.scale + bias.to(q.dtype)
    scores = scores.masked_fill(~seen_by(call, q.shape[0], q.shape[2], k.shape[2]), -torch.inf)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return (weights if kept is None else weights * kept) @ v


def results(function, tensors, grad, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check(tensors, call, kept=None):
    q, _, v, _ = tensors
    grad = torch.randn(*q.shape[:3], v.shape[3]).to(DEVICE, q.dtype)
    mine = results(lambda q, k, v, bias: biased_attention(q, k, v, bias, call), tensors, grad)
    low = results(
        lambda q, k, v, bias: textbook(q, k, v, bias, call, None if kept is None else kept.to(q.dtype)), tensors, grad
    )
    wide = None if kept is None else kept.double()
    ref = results(lambda q, k, v, bias: textbook(q, k, v, bias, call, wide), tensors, grad, torch.float64)
    for a, b, c, factor in zip(mine, low, ref, (2.0, 3.0, 3.0, 3.0, 3.0), strict=True):
        assert a.dtype == b.dtype
        assert_conforms(a, b, c, factor=factor)
    return mine


def made(B, HKV, G, Sq, Sk, D, Dv, bias_shape, dtype, bias_dtype, seed=0):
    torch.manual_seed(seed)
    shapes = (B, Sq, HKV * G, D), (B, Sk, HKV, D), (B, Sk, HKV, Dv)
    q, k, v = (torch.randn(s).to(DEVICE, dtype).transpose(1, 2) for s in shapes)
    full = (B, HKV * G, Sq, Sk)
    bias = torch.randn([n if keep else 1 for n, keep in zip(full, bias_shape, strict=True)])
    return q, k, v, bias.to(DEVICE, bias_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=6, deadline=None)
@given(
    B=st.integers(1, 3), heads=st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]), Sq=st.integers(1, 24),
    Sk=st.integers(1, 34), D=st.sampled_from([(8, 8), (16, 16), (20, 12), (32, 64)]),
    bias_shape=st.tuples(*[st.booleans()] * 3, st.just(True)),
    sides=st.sampled_from([(None, None), (None, 0), (3, 0), (5, 2), (None, 4)]),
    bounded=st.booleans(), mask=st.sampled_from([None, (1, 1), (3, 1), (1, 2)]), wide=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_conforms(dtype, B, heads, Sq, Sk, D, bias_shape, sides, bounded, mask, wide, seed):
    HKV, G = heads
    call = Biased(D[0] ** -0.5, sides)
    tensors = made(B, HKV, G, Sq, Sk, D[0], D[1], bias_shape, dtype, torch.float32 if wide else dtype, seed)
    if bounded:
        first = torch.randint(0, Sk, (B,), dtype=torch.int32)
        end = first + torch.randint(0, Sk + 1, (B,), dtype=torch.int32)
        call = call._replace(first=first.to(DEVICE), end=end.clamp(max=Sk).to(DEVICE))
    if mask is not None:
        shape = (B if mask[0] > 1 else 1, HKV * G if mask[1] > 1 else 1, Sq, Sk)
        call = call._replace(mask=(torch.rand(shape) < 0.7).to(DEVICE))
    check(tensors, call)


def test_what_all_keys_share_changes_nothing():
    """A bias without an axis of keys: softmax does not feel it, and its gradient is zero but for rounding."""
    q, k, v, bias = made(2, 1, 2, 9, 17, 16, 16, (False, True, True, False), torch.float32, torch.float32)
    out, *grads = results(
        lambda q, k, v, bias: biased_attention(q, k, v, bias, Biased(0.25)), (q, k, v, bias), torch.randn_like(q)
    )
    torch.testing.assert_close(out, textbook(q, k, v, torch.zeros(1, device=DEVICE), Biased(0.25)))
    assert grads[3].shape == bias.shape
    torch.testing.assert_close(grads[3], torch.zeros_like(bias), atol=1e-5, rtol=0)


def test_a_bias_hides_keys():
    """-inf in it is a mask; who sees nothing gets zeros and gives no gradient."""
    q, k, v, bias = made(2, 2, 2, 9, 17, 16, 16, (True, True, True, True), torch.float32, torch.float32)
    bias[:, :, 4] = -torch.inf
    bias[0, 1, :, 5:] = -torch.inf
    out, *grads = check((q, k, v, bias), Biased(0.25))
    assert not out[:, :, 4].any()
    assert not grads[3][:, :, 4].any()
    assert not grads[3][0, 1, :, 5:].any()


def test_strides():
    """Slices, broadcast values and a transposed bias."""
    packed = torch.randn(2, 11, 3, 4, 16, device=DEVICE)
    q, k, v = packed.transpose(1, 3).unbind(2)
    bias = torch.randn(4, 11, 11, device=DEVICE).mT
    check((q, k[:, :1].expand(-1, 4, -1, -1), v, bias[None]), Biased(0.25, (None, 0)))
    out = biased_attention(q, k, v, bias, Biased(0.25))
    torch.testing.assert_close(out, textbook(q, k, v, bias, Biased(0.25)))


@pytest.mark.parametrize("bias_shape", [(False, True, True, True), (True, True, True, True)])
def test_dropout(bias_shape):
    """The weights that a seed drops are the same ones forward and in all gradients, and as many as asked for."""
    B, Sq, Sk = 2, 17, 64
    q, k, _, bias = made(B, 2, 2, Sq, Sk, 16, 16, bias_shape, torch.float32, torch.float32)
    call = Biased(0.25, dropout=0.3)
    eye = torch.eye(Sk, device=DEVICE).expand(B, 2, -1, -1)
    torch.manual_seed(5)
    dropped = biased_attention(q, k, eye, bias, call)
    weights = textbook(q, k, eye, bias, call)
    kept = torch.where(dropped == 0, 0.0, 1 / 0.7)
    torch.testing.assert_close(dropped, weights * kept)
    share = (kept == 0).float().mean()
    assert abs(share - 0.3) < 4 * (0.21 / kept.numel()) ** 0.5
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0, 0], kept[0, 1])
    v = torch.randn(B, 2, Sk, 16, device=DEVICE)
    grad = torch.randn(B, 4, Sq, 16, device=DEVICE)
    torch.manual_seed(5)
    mine = results(lambda q, k, v, bias: biased_attention(q, k, v, bias, call), (q, k, v, bias), grad)
    truth = results(
        lambda q, k, v, bias: textbook(q, k, v, bias, call, kept.double()), (q, k, v, bias), grad, torch.float64
    )
    for a, b in zip(mine, truth, strict=True):
        torch.testing.assert_close(a, b.float(), atol=2e-5, rtol=1e-4)
    assert not torch.equal(biased_attention(q, k, v, bias, call), mine[0])  # the next call drops others


def test_twice_differentiated_is_refused():
    q, k, v, bias = (t.requires_grad_() for t in made(1, 1, 1, 3, 3, 8, 8, (True,) * 4, torch.float32, torch.float32))
    out = biased_attention(q, k, v, bias, Biased(1.0))
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="grad"):
        first.sum().backward()
