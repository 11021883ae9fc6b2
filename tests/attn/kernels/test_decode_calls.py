"""How the decode kernels are called: layouts, tunings, plans, refusals, and as an operator of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("triton")

from decode_checks import DEVICE, check, inputs, ints, run

from hf_attn_patch.attn.kernels.decode import grouped_decode, mask_bounds
from hf_attn_patch.attn.kernels.decode_plan import Tuning, choose, plan


@pytest.mark.parametrize(
    "tuning",
    [
        None,
        Tuning(direct=True),
        Tuning(block_n=16, least=1, direct=False, lazy_sum=False),
        Tuning(block_n=32, least=1, waves=3, block_m=32, direct=False),
    ],
    ids=["default", "direct", "eager sum", "waves"],
)
def test_result_does_not_depend_on_tuning(tuning: Tuning | None) -> None:
    ends = {"first": ints(0, 50), "end": ints(90, 80)}
    check(*inputs(2, 10, 1, 2, 90, 16), tuning, window=60, sinks=torch.zeros(10, device=DEVICE), **ends)


def test_strided_caches() -> None:
    q, k, v = inputs(2, 4, 2, 1, 64, 32)
    want = run(q, k, v)[0]
    buffer = torch.full((2, 96, 2, 2, 64), float("nan"), device=DEVICE)  # [B, S, k or v, H, wide D]
    buffer[:, 16:80, 0, :, 8:40], buffer[:, 16:80, 1, :, 8:40] = k.transpose(1, 2), v.transpose(1, 2)
    k_view, v_view = (buffer[:, 16:80, i, :, 8:40].transpose(1, 2) for i in (0, 1))
    wide = torch.randn(2, 1, 4, 50, device=DEVICE)
    wide[..., 5:37] = q.transpose(1, 2)
    assert torch.equal(run(wide[..., 5:37].transpose(1, 2), k_view, v_view)[0], want)
    dense = torch.randn(2, 2, 32, 64, device=DEVICE).mT  # keys contiguous, not the head dimension
    check(q, dense, v)
    one = k[:1, :1].expand(2, 2, 64, 32)
    check(q, one, v)


@given(heads=st.integers(1, 600), tiles=st.integers(0, 3000), slots=st.integers(1, 600), least=st.integers(1, 16))
@example(heads=1, tiles=70, slots=5, least=15)  # a cut that follows the head would be shorter than the least
def test_plan_shares_tiles_evenly(heads: int, tiles: int, slots: int, least: int) -> None:
    split, workers = plan(heads, tiles, slots, Tuning(least=least), varlen=False)
    if split:
        total, needed = heads * tiles, -(-heads * tiles // least)
        assert total // workers >= least or workers == needed
        # as many tiles one after the other as where all slots are used, or next to that
        assert -(-workers // slots) * -(-total // workers) <= 1.03 * -(-total // min(slots, needed))
    else:
        assert workers == heads


@pytest.mark.parametrize(
    ("heads", "span", "varlen", "wide", "direct"),
    [
        (128, 8192, False, True, True),  # a head for each of 132 SMs
        (128, 8192, True, False, None),
        (512, 8192, False, True, True),  # four each
        (128, 300, False, False, True),  # too short to need many bytes in flight
        (8, 131072, True, True, None),  # sixteen SMs a head
        (8, 4096, False, False, None),
        (64, 8192, False, False, None),
        (140, 8192, False, False, None),  # eight SMs would do twice what the others do
    ],
)
def test_choice_of_tuning(heads: int, span: int, varlen: bool, wide: bool, direct: bool | None) -> None:
    tuning = choose(torch.bfloat16, 128, 128, heads, span, 132, varlen)
    assert (tuning.block_n, tuning.warps, tuning.per_sm) == ((128, 8, 1) if wide else (64, 4, 2))
    assert tuning.direct is direct


def test_mask_bounds() -> None:
    mask = torch.zeros(4, 1, 2, 300, dtype=torch.bool, device=DEVICE)
    mask[0, 0, 0, 7] = mask[0, 0, 1, 299] = mask[1, 0, 1, 0] = True
    mask[3] = True
    first, end = mask_bounds(mask.expand(4, 6, 2, 300))
    assert first.tolist()[:2] == [7, 0]
    assert end.tolist() == [300, 1, 0, 300]
    assert first[2] >= end[2]
    assert first[3] == 0


def test_refusals() -> None:
    q, k, v = inputs(1, 4, 2, 1, 20, 32)
    with pytest.raises(ValueError, match="choose one of 1, 2, 4"):
        grouped_decode(q, k[:, :1].expand(1, 3, 20, 32), v[:, :1].expand(1, 3, 20, 32), scale=1.0)
    with pytest.raises(ValueError, match="do not go together"):
        grouped_decode(q, k[..., :16], v, scale=1.0)
    with pytest.raises(ValueError, match="1025 query tokens"):
        grouped_decode(q.expand(1, 4, 1025, 32), k, v, scale=1.0)
    with pytest.raises(ValueError, match="one dtype"):
        grouped_decode(q.half(), k, v, scale=1.0)
    with pytest.raises(ValueError, match="needs causal=True"):
        grouped_decode(q, k, v, scale=1.0, window=4, causal=False)
    with pytest.raises(ValueError, match="given as bias"):
        grouped_decode(q, k, v, scale=1.0, mask=torch.zeros(1, 1, 1, 20, device=DEVICE))
    with pytest.raises(ValueError, match=r"sinks has the shape \[2\], not \[4\]"):
        grouped_decode(q, k, v, scale=1.0, sinks=torch.zeros(2, device=DEVICE))
    with pytest.raises(ValueError, match="but end is not"):
        grouped_decode(q, k, v, scale=1.0, end=torch.zeros(1, dtype=torch.int32, device="meta"))
    with pytest.raises(RuntimeError, match="no backward"):
        grouped_decode(q.requires_grad_(), k, v, scale=1.0)
    with torch.no_grad():
        assert grouped_decode(q, k, v, scale=1.0).shape == (1, 4, 1, 32)  # type: ignore[union-attr]


def test_calls_that_look_alike() -> None:
    """What is remembered of a call must not be used for one that differs in any way that counts."""
    q, k, v = inputs(2, 4, 2, 1, 32, 32)
    wide = torch.randn(2, 2, 32, 48, device=DEVICE)
    ends = (ints(32, 20), ints(3, 32), ints(32, 20).long(), torch.stack([ints(32, 20)] * 2, 1)[:, 0])
    for _ in range(2):
        check(q, k, v)
        check(q, wide[..., :32], v)
        check(q, wide[..., 1:33], v)
        for end in ends:
            check(q, k, v, end=end)
        check(q, k, v, scale=0.5)
        check(q, k, v, window=9)


def test_no_rows_and_no_keys() -> None:
    q, k, v = inputs(2, 4, 2, 1, 8, 32)
    assert run(q[:0], k[:0], v[:0])[0].shape == (0, 4, 1, 32)
    nobody = torch.ones(2, 1, 1, 0, dtype=torch.bool, device=DEVICE)
    cases: tuple[dict[str, Any], ...] = ({}, {"mask": nobody}, {"end": ints(0, 0)})
    for options in cases:
        out, lse = run(q, k[:, :, :0], v[:, :, :0], **options)
        assert not out.any() and (lse == float("-inf")).all()
    sinks = torch.arange(4.0, device=DEVICE)
    out, lse = run(q, k[:, :, :0], v[:, :, :0], sinks=sinks)
    assert not out.any() and torch.equal(lse, sinks.expand(2, 4)[..., None])
    for keys in (0, 8):
        out, lse = run(q[:, :, :0], k[:, :, :keys], v[:, :, :keys], sinks=sinks, window=3)
        assert out.shape == (2, 4, 0, 32) and lse.shape == (2, 4, 0)


def test_is_an_operator() -> None:
    q, k, v = inputs(2, 4, 2, 1, 40, 32)
    op = torch.ops.hf_attn_patch.grouped_decode
    args = (q, k, v, None, None, ints(40, 9), *[None] * 5, 0.2, True, None, None, True)
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        out = grouped_decode(2 * q, k, v, scale=0.1, end=end)
        assert isinstance(out, torch.Tensor)
        return out + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = run(q, k, v, None, scale=0.2, end=ints(40, 9))[0] + 1
    torch.testing.assert_close(compiled(q, k, v, ints(40, 9)), want)
