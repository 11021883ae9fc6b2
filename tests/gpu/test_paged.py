"""Continuous batching with a block table on a GPU."""

from __future__ import annotations

import pytest
import torch
from conformance import assert_conforms
from paged_requests import PagedRequests

from hf_attn_patch import attention, attention_varlen
from hf_attn_patch.attn.backends.registry import BACKENDS
from hf_attn_patch.errors import AttentionError
from hf_attn_patch.hf.paged_decode import paged_decode

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("heads", [(8, 8, 64), (32, 8, 128), (8, 1, 64)], ids=str)
@pytest.mark.parametrize("page", [16, 256])
def test_pages_are_written_and_read(page: int, heads: tuple[int, int, int]) -> None:
    x = PagedRequests([700, 1, 33, 256, 0, 0], page, *heads, "cuda", torch.bfloat16)
    low, ref = x.truth(torch.bfloat16), x.truth(torch.float32)
    k_pages, v_pages = x.pages
    out = paged_decode(
        x.query, x.key, x.value, k_pages, v_pages, x.table, x.cu, scaling=heads[2] ** -0.5, softcap=None, sinks=None
    )
    assert_conforms(out, low, ref)
    for pages, new in zip(x.pages, (x.key, x.value), strict=True):
        for r, n in enumerate(x.lengths[:4]):
            assert torch.equal(pages[x.table[r, (n - 1) // page], (n - 1) % page], new[0, :, r])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_a_token_for_each_request_without_a_table(backend: str) -> None:
    """What continuous batching asks when all requests decode: one query each, over keys one after another."""
    keys = [700, 1, 33, 256]
    q = torch.randn(len(keys), 32, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(sum(keys), 8, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    cu_q, cu_k = (torch.tensor([0, *n], device="cuda").cumsum(0) for n in ([1] * len(keys), keys))
    try:
        out = attention_varlen(
            q, k, v, cu_q, cu_k, max_seqlen_q=1, max_seqlen_k=max(keys), causal=True, backend=backend
        )
    except AttentionError as refusal:
        pytest.skip(str(refusal))
    for i, (first, last) in enumerate(zip(cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True)):
        one = (q[i][None, :, None], *(t[first:last].transpose(0, 1)[None] for t in (k, v)))
        low = attention(*one, backend="reference")[0, :, 0]
        ref = attention(*(t.float() for t in one), backend="reference")[0, :, 0]
        assert_conforms(out[i], low, ref)
