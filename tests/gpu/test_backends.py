"""Every backend that runs on this GPU against the fp32 truth: output and gradients, poisoned memory, odd shapes.

Run with ``pytest -m gpu``. A backend that refuses a request is skipped with its own reason.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from conformance import assert_conforms

from hf_attn_patch.attn.backends.registry import BACKENDS, backend
from hf_attn_patch.attn.dispatch import attend
from hf_attn_patch.attn.visibility import Dense, Padded, Visibility, full, packed
from hf_attn_patch.errors import AttentionError

pytestmark = pytest.mark.gpu
KINDS = ["full", "causal", "window", "both sides", "padded", "padded causal", "packed", "dense"]
LENGTHS = [(64, 128), (239, 1), (799, 3), (113, 203), (108, 256), (1023, 1024), (1024, 1023)]
FUSED = [name for name in BACKENDS if name != "reference"]


def poison() -> None:
    """Leave NaN in the memory that the next torch.empty gets."""
    blocks = [
        torch.full((n,), float("nan"), device="cuda") for n in (1 << 24, 1 << 22, 1 << 20, 1 << 18) for _ in range(3)
    ]
    del blocks


def make(B, HQ, HKV, Sq, Sk, D, dtype, Dv=None, seed=0):
    g = torch.Generator(device="cuda").manual_seed(seed)
    shapes = (B, Sq, HQ, D), (B, Sk, HKV, D), (B, Sk, HKV, Dv or D)
    return [torch.randn(s, generator=g, device="cuda").to(dtype).transpose(1, 2) for s in shapes]


def layouts(kind, B, Sq, Sk):
    """A layout by name (Sq == Sk where it says self-attention)."""
    if kind in ("full", "causal"):
        return full(Sq, Sk, kind == "causal", (None, None), B)
    if kind == "window":
        return full(Sq, Sk, True, (16, None), B)
    if kind == "both sides":
        return full(Sq, Sk, False, (9, 5), B)
    first = torch.tensor([0, 5, Sk // 2, 1][:B], device="cuda", dtype=torch.int32)
    length = torch.tensor([Sk, Sk - 9, Sk // 3, 0][:B], device="cuda", dtype=torch.int32)
    if kind == "padded":
        return Padded(B, Sq, Sk, first=first, length=length)
    if kind == "padded causal":
        return Padded(B, Sq, Sk, True, first=first, length=length, restrict_queries=True)
    if kind == "packed":
        borders = [0, 1, Sk // 3, Sk // 3, *(b * Sk for b in range(1, B)), (B - 1) * Sk + 7, B * Sk - 3]
        cu = torch.tensor(borders, device="cuda")
        return packed(B, Sq, Sk, cu, cu, Sk, Sk, True)
    assert kind == "dense"
    mask = torch.rand(B, 1, Sq, Sk, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) < 0.7
    mask[:, :, 1:2] = False
    mask[0, ..., 3:4] = False
    return Dense(B, Sq, Sk, mask=mask)


def plain(q, k, v, layout, scale, softcap=None, sinks=None, bias=None):
    """Low-precision PyTorch, written out."""
    G = q.shape[1] // k.shape[1]
    k, v = (t[:, :, layout.start : layout.stop].repeat_interleave(G, 1) for t in (k, v))
    s = (q @ k.mT) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.to(s.dtype)
    mask = layout.dense(q.device)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    p = torch.softmax(s, -1)
    p = p.masked_fill((s == -torch.inf).all(-1, keepdim=True), 0)
    return p[..., : k.shape[2]] @ v


def check(name, kind, B, HQ, HKV, Sq, Sk, D, dtype, *, grad=True, softcap=None, sinks=False, bias=None, Dv=None):
    q, k, v = make(B, HQ, HKV, Sq, Sk, D, dtype, Dv)
    layout = layouts(kind, B, Sq, Sk)
    scale = 1 / math.sqrt(D)
    sink = torch.randn(HQ, device="cuda").to(dtype) if sinks else None
    add = None if bias is None else torch.randn(bias, HQ, Sq, Sk, device="cuda").to(dtype)
    valid = layout.valid_queries() if isinstance(layout, Padded) else None
    where = None if valid is None else valid[:, None, :, None]
    g = torch.randn(B, HQ, Sq, Dv or D, device="cuda").to(dtype)
    if where is not None:
        g = g * where
    results = []
    for run, wide in (
        ("test", dtype),
        ("plain", dtype),
        ("truth", torch.float32 if dtype.itemsize == 2 else torch.float64),
    ):
        leaves = [None if t is None else t.detach().to(wide).requires_grad_(grad) for t in (q, k, v, sink, add)]
        a, b, c, s, e = leaves
        assert a is not None and b is not None and c is not None
        with torch.set_grad_enabled(grad):
            if run == "test":
                poison()
                out = attend(a, b, c, visibility=layout, softcap=softcap, sinks=s, bias=e, name=name)[0]
            else:
                out = plain(a, b, c, layout, scale, softcap, s, e)
        grads = torch.autograd.grad((out * g.to(wide)).sum(), [t for t in leaves if t is not None]) if grad else ()
        results.append((out, grads))
    (out, grads), (low, low_grads), (ref, ref_grads) = results
    assert_conforms(out, low, ref, where=where)
    if where is not None:
        assert torch.isfinite(out).all(), "rows without keys are not finite"
    for mine, theirs, true in zip(grads, low_grads, ref_grads, strict=True):
        assert_conforms(mine, theirs, true, factor=3.0)


def attempt(*args, **kwargs):
    try:
        check(*args, **kwargs)
    except AttentionError as error:
        if "cannot run this exactly" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "kind", ["full", "causal", "window", "both sides", "padded", "padded causal", "packed", "dense"]
)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("name", FUSED)
def test_layouts(name, kind, heads):
    attempt(name, kind, 4, *heads, 131, 131, 64, torch.bfloat16)


@pytest.mark.parametrize("options", [{"softcap": 15.0}, {"sinks": True}, {"bias": 1}, {"bias": 2}], ids=str)
@pytest.mark.parametrize("kind", ["causal", "padded causal", "dense"])
@pytest.mark.parametrize("name", FUSED)
def test_options(name, kind, options):
    attempt(name, kind, 2, 8, 2, 131, 131, 64, torch.bfloat16, **options)


@pytest.mark.parametrize("D", [32, 40, 59, 80, 96, 111, 128, 160, 192, 224, 256, 512])
@pytest.mark.parametrize("name", [n for n in FUSED if n != "flex"])
def test_head_dims(name, D):
    attempt(name, "causal", 2, 4, 2, 130, 130, D, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["causal", "padded", "padded causal", "packed", "dense"])
@pytest.mark.parametrize("name", FUSED)
def test_dtypes(name, kind, dtype):
    attempt(name, kind, 3, 8, 2, 97, 97, 64, dtype)


@pytest.mark.parametrize(
    ("Sq", "Sk"), [(64, 128), (239, 1), (799, 3), (113, 203), (108, 256), (1023, 1024), (1024, 1023)]
)
@pytest.mark.parametrize("kind", ["full", "causal", "padded"])
@pytest.mark.parametrize("name", [n for n in FUSED if n != "flex"])
def test_lengths(name, kind, Sq, Sk):
    attempt(name, kind, 1, 4, 2, Sq, Sk, 64, torch.bfloat16)


@pytest.mark.parametrize("kind", ["full", "causal", "padded", "padded causal", "dense", "window"])
@pytest.mark.parametrize(("Sq", "Sk"), [(1, 1), (1, 339), (3, 799), (16, 20000), (1, 131072)])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("name", [n for n in FUSED if n != "flex"])
def test_decode(name, kind, Sq, Sk, heads):
    if kind.startswith("padded") and Sk < 32:
        pytest.skip("too short to pad")
    attempt(name, kind, 2, *heads, Sq, Sk, 128, torch.bfloat16, grad=False)


@pytest.mark.parametrize("name", FUSED)
def test_forward_is_repeatable(name):
    q, k, v = make(2, 8, 2, 257, 257, 64, torch.bfloat16)
    layout = full(257, 257, True, (None, None), 2)
    try:
        first = attend(q, k, v, visibility=layout, name=name)[0]
    except AttentionError as error:
        pytest.skip(str(error))
    for _ in range(3):
        assert torch.equal(first, attend(q, k, v, visibility=layout, name=name)[0])


@pytest.mark.parametrize("name", FUSED)
def test_nan_in_padding_does_not_leak(name):
    q, k, v = make(3, 8, 2, 131, 131, 64, torch.bfloat16)
    layout = layouts("padded causal", 3, 131, 131)
    j = torch.arange(131, device="cuda")
    pad = (j < layout.first[:, None]) | (j >= (layout.first + layout.length)[:, None])
    try:
        clean = attend(q, k, v, visibility=layout, name=name)[0]
    except AttentionError as error:
        pytest.skip(str(error))
    k, v = (t.masked_fill(pad[:, None, :, None], float("nan")) for t in (k, v))
    dirty = attend(q, k, v, visibility=layout, name=name)[0]
    where = layout.valid_queries()[:, None, :, None].expand_as(clean)
    assert torch.equal(clean[where], dirty[where])
    assert torch.isfinite(dirty).all()


@pytest.mark.parametrize("hidden_by", ["bias", "lowest number", "bias and causality", "heads"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_nan_behind_what_is_added_does_not_leak(name, grad, hidden_by):
    B, HQ, HKV, S, D = 2, 8, 2, 131 if name != "triton_decode" else 9, 64
    q, k, v = make(B, HQ, HKV, S, S, D, torch.bfloat16)
    g = torch.Generator("cuda").manual_seed(1)
    see = torch.rand(B, HQ, S, S, generator=g, device="cuda") < 0.7
    see[..., 0] = True
    see[0, ..., S - 5 :] = False
    if hidden_by == "heads":
        see[1, :4, :, 3:7] = False
    causal = hidden_by == "bias and causality"
    if causal:
        see[1, :, S // 2 :, S // 2] = False  # and from the rows before, by causality
    own = torch.ones(S, S, dtype=torch.bool, device="cuda")
    own = own.tril() if causal else own
    number = torch.finfo(torch.bfloat16).min if hidden_by == "lowest number" else -torch.inf
    bias = torch.randn(B, HQ, S, S, generator=g, device="cuda").bfloat16().masked_fill(~see, number)
    unseen = ~(see & own).unflatten(1, (HKV, HQ // HKV)).any(2).any(2)[..., None]
    assert unseen.any()
    results = []
    for keys, values in ((k, v), (k.masked_fill(unseen, float("nan")), v.masked_fill(unseen, float("inf")))):
        leaves = [t.detach().requires_grad_(grad) for t in (q, keys, values)]
        try:
            a, b, c = leaves
            out = attend(a, b, c, full(S, S, causal, (None, None), B), bias=bias, name=name)[0]
        except AttentionError as error:
            pytest.skip(str(error))
        results.append((out, *(torch.autograd.grad(out.float().square().sum(), leaves) if grad else ())))
    for clean, dirty in zip(*results, strict=True):
        assert dirty.isfinite().all()
        torch.testing.assert_close(dirty, clean)
    for t in results[1][2:]:
        assert not t[unseen.expand_as(t)].any()


@pytest.mark.parametrize("kind", ["packed", "window"])
@pytest.mark.parametrize("name", BACKENDS)
def test_nan_outside_documents_and_windows_does_not_leak(name, kind):
    """Behind the last border, and before the first key that a window reaches; forward and backward."""
    Sq, Sk = (203, 203) if kind == "packed" else (70, 203)
    q, k, v = make(1, 8, 2, Sq, Sk, 64, torch.bfloat16)
    cu = torch.tensor([0, 64, 131, 190], device="cuda")
    layout: Visibility
    if kind == "packed":
        layout, unseen = packed(1, Sq, Sk, cu, cu, 67, 67, True), torch.arange(Sk, device="cuda") >= 190
    else:
        layout, unseen = full(Sq, Sk, False, (9, None)), torch.arange(Sk, device="cuda") < Sk - Sq - 9
    results = []
    for fill in (0.0, float("nan")):
        leaves = [q.detach().requires_grad_()]
        leaves += [t.masked_fill(unseen[:, None], fill).detach().requires_grad_() for t in (k, v)]
        try:
            a, b, c = leaves
            out = attend(a, b, c, layout, name=name)[0]
        except AttentionError as error:
            pytest.skip(str(error))
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for clean, dirty in zip(*results, strict=True):
        assert dirty.isfinite().all()
        torch.testing.assert_close(dirty, clean, atol=2e-2, rtol=2e-2)  # backwards add up atomically


@pytest.mark.parametrize("options", [{}, {"bias": 1}, {"bias": 2}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("kind", ["full", "causal", "padded", "packed", "dense"])
@pytest.mark.parametrize("heads", [(32, 1), (32, 4)])
@pytest.mark.parametrize("name", BACKENDS)
def test_large_groups_add_up_their_gradients(name, heads, kind, options):
    attempt(name, kind, 2, *heads, 131, 131, 64, torch.bfloat16, **options)


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"sinks": 8}, {"dropout": 0.2}, {"bias": True}], ids=str)
@pytest.mark.parametrize("name", [None, *BACKENDS])
def test_empty_calls(name, options, sizes):
    B, Sq, Sk = sizes
    leaves = [t.requires_grad_() for t in make(B, 8, 2, Sq, Sk, 64, torch.bfloat16)]
    more = dict(options)
    if "sinks" in options:
        more["sinks"] = torch.randn(8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    if "bias" in options:
        more["bias"] = torch.randn(1, 8, Sq, Sk, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves += [t for t in more.values() if isinstance(t, torch.Tensor)]
    try:
        a, b, c = leaves[:3]
        out = attend(a, b, c, full(Sq, Sk, True, (None, None), B), name=name, **more)[0]
    except AttentionError as error:
        pytest.skip(str(error))
    assert out.shape == (B, 8, Sq, 64)
    assert not out.any()
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@pytest.mark.parametrize("name", FUSED)
def test_strange_strides(name):
    base = torch.randn(2, 131, 3 * 8 * 64 + 8, device="cuda", dtype=torch.bfloat16)[..., 8:]
    q, k, v = base.unflatten(-1, (3, 8, 64)).transpose(1, 3).unbind(2)
    v = v[:, :2].expand(2, 2, 131, 64) if name != "flex" else v[:, :2]
    k = k[:, :2]
    layout = full(131, 131, True, (None, None), 2)
    try:
        out = attend(q, k, v, visibility=layout, name=name)[0]
    except AttentionError as error:
        pytest.skip(str(error))
    ref = plain(q.float(), k.float(), v.float(), layout, 0.125)
    assert_conforms(out, plain(q, k, v, layout, 0.125), ref)


def test_flex_is_compiled_for_every_shape(monkeypatch):
    import torch._dynamo

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # flex warns where it runs unfused
        for S in (130, 390):
            q, k = (torch.randn(1, heads, S, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
            out = attend(q, k, k, visibility=full(S, S, True, (None, None)), softcap=20.0, name="flex")[0]
            args = full(S, S, True, (None, None)), 0.125
            wide = plain(q.float(), k.float(), k.float(), *args, softcap=20.0)
            assert_conforms(out, plain(q, k, k, *args, softcap=20.0), wide)


def test_dropout_on_the_gpu():
    q = torch.zeros(1, 2, 256, 64, device="cuda", dtype=torch.float16)
    k = torch.zeros(1, 1, 1024, 64, device="cuda", dtype=torch.float16)
    v = torch.ones_like(k)
    for name in FUSED:
        try:
            out = attend(q, k, v, visibility=full(256, 1024, False, (None, None)), dropout=0.25, name=name)[0].float()
        except AttentionError:
            continue
        assert abs(out.mean() - 1) < 0.01, name
        assert abs(out[..., 0].var() - 0.25 / (1024 * 0.75)) < 1e-4, name


def test_which_backends_were_here():
    """Not a check: the list for the log of what ran."""
    for name in BACKENDS:
        missing = getattr(backend(name), "missing", lambda: None)()
        print(f"{name}: {missing or 'here'}")
