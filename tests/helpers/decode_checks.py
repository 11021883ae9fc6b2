"""Calls of the decode kernels, held to their plain truth."""

from __future__ import annotations

from typing import Any

import interpreter
import torch
from conformance import assert_conforms

from hf_attn_patch.attn.kernels import decode
from hf_attn_patch.attn.kernels.decode_plan import Tuning
from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_reference

DEVICE = interpreter.DEVICE
SMALL = Tuning(block_n=16, least=2)  # so that short caches are split, too


def inputs(
    B: int, HQ: int, HKV: int, Sq: int, Sk: int, D: int, DV: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(B + Sk)
    shapes = ((B, HQ, Sq, D), (B, HKV, Sk, D), (B, HKV, Sk, DV or D))
    return tuple(torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)  # type: ignore[return-value]


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tuning: Tuning | None = SMALL, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    defaults: dict[str, Any] = dict.fromkeys((*decode.DecodeOperands._fields[3:11], "window", "softcap"))
    defaults |= {"scale": q.shape[-1] ** -0.5, "causal": True}
    out, lse = decode.launch(decode.DecodeOperands(q, k, v, return_lse=True, **{**defaults, **options}), tuning)
    assert lse is not None
    return out, lse


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tuning: Tuning | None = SMALL, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"scale": q.shape[-1] ** -0.5, **options}
    out, lse = run(q, k, v, tuning, **options)
    if DEVICE == "cuda":
        again, lse_again = run(q, k, v, tuning, **options)
        assert torch.equal(out, again)
        assert torch.equal(lse, lse_again)
    low, _ = grouped_decode_reference(q, k, v, **options)
    ref, ref_lse = grouped_decode_reference(q.double(), k.double(), v.double(), **options)
    assert out.dtype == q.dtype
    assert_conforms(out, low, ref)
    torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-3, atol=1e-3 if q.dtype == torch.float16 else 1e-5)
    return out, lse


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)
