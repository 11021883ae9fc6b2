"""Documents or rows of one query each (decoding in a batch) among segments that hold none: what kernels are told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_attn_patch.attn.backends._varlen import run_varlen
from hf_attn_patch.attn.request import Operands
from hf_attn_patch.attn.visibility import Packed, Padded, packed

KEYS = [3, 1, 5]


def as_flash_attention_2(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """q [T, HQ, D] -> [T, HQ, D]. Told that no segment is longer than a query, it takes each for one and its group for
    rows, as ``mha_varlen_fwd`` does."""
    HKV, G = k.shape[1], q.shape[1] // k.shape[1]
    if max_q == 1 and G > 1:
        q.reshape(len(cu_q) - 1, HKV, G, q.shape[-1])
    out = torch.zeros_like(q)
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        assert b - a <= max_q and d - c <= max_k
        if b > a and d > c:
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d].repeat_interleave(G, 1))
            out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:d].repeat_interleave(G, 1))
    return out


def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [1, HQ, 1, D] over k [1, HKV, S, D]."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=True)


@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
def test_packed(heads: tuple[int, int]) -> None:
    q = torch.randn(1, heads[0], len(KEYS), 8)
    k, v = (torch.randn(1, heads[1], sum(KEYS), 8) for _ in "kv")
    cu_q, cu_k = torch.arange(len(KEYS) + 1), torch.tensor([0, *KEYS]).cumsum(0)
    seen = packed(1, len(KEYS), sum(KEYS), cu_q, cu_k, 1, max(KEYS), True)
    assert isinstance(seen, Packed) and len(seen.cu_q) > len(cu_q)  # segments without queries
    out = run_varlen(q, k, v, Operands(seen, 1.0), as_flash_attention_2)
    for i, (first, last) in enumerate(zip(cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True)):
        torch.testing.assert_close(out[:, :, [i]], truth(q[:, :, [i]], *(t[:, :, first:last] for t in (k, v))))


def test_padded() -> None:
    q = torch.randn(len(KEYS), 4, 1, 8)
    k, v = (torch.randn(len(KEYS), 2, 6, 8) for _ in "kv")
    lengths = torch.tensor(KEYS, dtype=torch.int32)
    seen = Padded(len(KEYS), 1, 6, first=6 - lengths, length=lengths)
    out = run_varlen(q, k, v, Operands(seen, 1.0), as_flash_attention_2)
    for row, n in enumerate(KEYS):
        torch.testing.assert_close(out[[row]], truth(q[[row]], *(t[[row], :, 6 - n :] for t in (k, v))))
