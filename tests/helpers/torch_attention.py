"""torch.nn.MultiheadAttention beside the GroupedQueryAttention that computes the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_patch.modeling import GroupedQueryAttention

E, HQ, D = 16, 4, 4


def pair(hkv: int, batch_first: bool = True, dropout: float = 0.0, seed: int = 0) -> tuple[Any, Any]:
    """torch's module with its K and V heads written out for each query head, and ours with HKV of them."""
    torch.manual_seed(seed)
    ours = GroupedQueryAttention(E, HQ, hkv, bias=True, batch_first=batch_first, dropout=dropout).double().eval()
    for p in ours.parameters():
        nn.init.normal_(p, 0, 0.5)
    torchs = nn.MultiheadAttention(E, HQ, batch_first=batch_first, dropout=dropout).double().eval()

    def written_out(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (hkv, D)).repeat_interleave(HQ // hkv, 0).flatten(0, 1)

    with torch.no_grad():
        projections = (ours.q_proj, ours.k_proj, ours.v_proj)
        for name, target in (("weight", torchs.in_proj_weight), ("bias", torchs.in_proj_bias)):
            q, k, v = (getattr(p, name) for p in projections)
            target.copy_(torch.cat([q, written_out(k), written_out(v)]))
        torchs.out_proj.weight.copy_(ours.o_proj.weight)
        torchs.out_proj.bias.copy_(ours.o_proj.bias)
    return torchs, ours


def close(a: Any, b: Any, tol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)
