"""Continuous batching with a block table on a GPU."""

from __future__ import annotations

import pytest
import torch
from conformance import assert_conforms
from paged_requests import PagedRequests

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
