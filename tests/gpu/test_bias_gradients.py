"""The gradient of a bias that heads and batch share, in half precision: held to twice plain attention's error."""

from __future__ import annotations

import math

import pytest
import torch
from conformance import assert_conforms

from hf_attn_patch.attn.backends.registry import BACKENDS
from hf_attn_patch.attn.dispatch import attend
from hf_attn_patch.attn.visibility import full
from hf_attn_patch.errors import AttentionError

pytestmark = pytest.mark.gpu


def plain(q, k, v, bias):
    G = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(G, 1) for t in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias.to(q.dtype)
    return torch.softmax(scores, -1) @ v


@pytest.mark.parametrize("given", ["half", "fp32", "fp32, frozen"])
@pytest.mark.parametrize("shape", [(1, 32), (1, 1)], ids=str)
@pytest.mark.parametrize("heads", [(32, 1), (32, 4)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_sums_over_heads_and_batch(name, heads, shape, given):  # each case takes flex seconds to compile
    S = 131
    g = torch.Generator("cuda").manual_seed(0)
    sizes = [(16, heads[0], S, 64), (16, heads[1], S, 64), (16, heads[1], S, 64), (16, heads[0], S, 64)]
    q, k, v, aim = (torch.randn(size, generator=g, device="cuda").bfloat16() for size in sizes)
    bias = torch.randn(*shape, S, S, generator=g, device="cuda")
    bias = bias.bfloat16() if given == "half" else bias
    results = []
    for kind, dtype in (("test", None), ("plain", None), ("truth", torch.float32)):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (q, k, v, bias)]
        a, b, c, e = leaves
        if given == "fp32, frozen":
            e.requires_grad_(False)
            del leaves[3]
        try:
            if kind == "test":
                out = attend(a, b, c, full(S, S, False, (None, None), 16), bias=e, name=name)[0]
            else:
                out = plain(a, b, c, e)
        except AttentionError as error:
            pytest.skip(str(error))
        results.append((out, *torch.autograd.grad(out, leaves, aim.to(out.dtype))))
    for place, (mine, low, truth) in enumerate(zip(*results, strict=True)):
        assert mine.dtype == low.dtype
        assert_conforms(mine, low, truth, factor=2.0 if place in (0, 4) else 3.0)
