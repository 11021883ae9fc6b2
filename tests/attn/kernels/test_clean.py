"""Zeros where nobody looks: the kernel against torch's operators."""

from __future__ import annotations

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from hf_attn_patch.attn.backends._unseen import Unseen
from hf_attn_patch.attn.kernels.clean import cleaned

DEVICE = interpreter.DEVICE


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(1, 3), heads=st.sampled_from([(1, 1), (2, 1), (3, 2)]), Sk=st.integers(1, 40),
    D=st.sampled_from([(8, 8), (20, 12), (64, 32)]), shared=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    how=st.sampled_from(["heads first", "tokens first", "slices"]),
    dtype=st.sampled_from([torch.float32, torch.float16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_as_torch_does_it(B, heads, Sk, D, shared, how, dtype, seed):
    HKV, G = heads
    torch.manual_seed(seed)

    def made(width):
        if how == "heads first":
            return torch.randn(B, HKV, Sk, width)
        if how == "tokens first":
            return torch.randn(B, Sk, HKV, width).transpose(1, 2)
        return torch.randn(B, HKV, Sk + 3, width + 8)[:, :, 1 : Sk + 1, 8:]

    k, v = (made(width).to(DEVICE, dtype) for width in D)
    for t in (k, v):
        t[torch.rand(t.shape, device=DEVICE) < 0.2] = float("nan")
        t[torch.rand(t.shape, device=DEVICE) < 0.1] = float("-inf")
    sizes = [1 if one else n for one, n in zip(shared, (B, HKV * G, Sk), strict=True)]
    peaks = torch.tensor([0.0, -torch.inf, torch.finfo(dtype).min])[torch.randint(3, sizes)].to(DEVICE)
    unseen = Unseen.under(peaks, dtype)
    want = unseen.clean(k, v)  # on a GPU the kernel too: it is held to the other one below
    if unseen.dead is None and unseen.low is None:
        return
    flags = unseen.flags(HKV)
    full = [n.expand(B, HKV * G, Sk).unflatten(1, (HKV, G)) for n in (peaks == -torch.inf, peaks < -1e4)]
    dead, low = full[0].all(2), full[1].all(2)
    for t, mine, torchs in zip((k, v), cleaned(k, v, flags), want, strict=True):
        truth = t.masked_fill(dead[..., None] | (low[..., None] & ~t.isfinite()), 0)
        assert torch.equal(mine.nan_to_num(7.0), truth.nan_to_num(7.0))
        assert torch.equal(torchs.nan_to_num(7.0), truth.nan_to_num(7.0))
