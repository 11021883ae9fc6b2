"""Decoding over shared parts: against fp64 over the keys put together, for shapes and rows that hypothesis picks."""

from __future__ import annotations

import interpreter  # isort: skip - before the kernels
from typing import Any

import pytest
import torch
from conformance import assert_conforms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_reference
from hf_attn_patch.attn.kernels.shared_decode import shared_decode
from hf_attn_patch.attn.shared import Parted, Rows, SharedPart
from hf_attn_patch.attn.shared_attend import shared_torch
from hf_attn_patch.decoding.program import Program
from hf_attn_patch.decoding.tape import Tape

WAYS = {"kernel": shared_decode, "torch": shared_torch}


@pytest.fixture(autouse=True, scope="module")
def tensors_lie_where_kernels_run():
    with torch.device(interpreter.DEVICE):
        yield


def together(tensor: Tensor, rows: list[int]) -> Tensor:
    """[R, HKV, S, D] as the rows of the batch see it, written another way than the code under test."""
    return torch.stack([tensor[row] for row in rows])


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    count = draw(st.integers(1, 3))
    even = draw(st.booleans())
    if even:
        rows = [r for r in range(count) for _ in range(draw(st.shared(st.integers(1, 5), key="n")))]
    else:
        rows = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=6))
    return {
        "rows": rows,
        "count": count,
        "kv_heads": draw(st.integers(1, 2)),
        "group": draw(st.sampled_from([1, 3, 4])),
        "queries": draw(st.integers(1, 3)),
        "dim": draw(st.sampled_from([8, 20, 32])),
        "value_dim": draw(st.sampled_from([8, 16])),
        "shared": draw(st.lists(st.integers(1, 90), min_size=1, max_size=2)),
        "own": draw(st.integers(3, 40)),
        "masked": draw(st.sampled_from(["", "rows", "heads", "one"])),
        "softcap": draw(st.sampled_from([None, 5.0])),
        "sinks": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float16, torch.float32])),
        "seed": draw(st.integers(0, 1000)),
    }


def build(case: dict[str, Any]) -> tuple[Tensor, Parted, Tensor, Tensor, Tensor | None, Tensor | None]:
    torch.manual_seed(case["seed"])
    rows, B = case["rows"], len(case["rows"])
    HKV, HQ, Sq, D, Dv = (
        case["kv_heads"],
        case["kv_heads"] * case["group"],
        case["queries"],
        case["dim"],
        case["value_dim"],
    )
    q = torch.randn(B, Sq, HQ, D).to(case["dtype"]).transpose(1, 2)
    parts, all_keys, all_values = [], [], []
    for i, length in enumerate(case["shared"]):
        # the first of two parts is what all have in common
        of, count = ([0] * B, 1) if len(case["shared"]) == 2 and i == 0 else (rows, case["count"])
        k, v = (torch.randn(count, HKV, length, d).to(case["dtype"]) for d in (D, Dv))
        parts.append(SharedPart(k, v, Rows(of, count)))
        all_keys.append(together(k, of))
        all_values.append(together(v, of))
    k, v = (torch.randn(B, HKV, case["own"], d).to(case["dtype"]) for d in (D, Dv))
    parted = Parted(tuple(parts), k, v)
    keys, values = torch.cat([*all_keys, k], 2), torch.cat([*all_values, v], 2)
    mask = None
    if case["masked"]:
        shape = {"rows": (B, 1), "heads": (B, HQ), "one": (1, 1)}[case["masked"]]
        mask = torch.rand(*shape, Sq, keys.shape[2]) < 0.6
        mask[0, 0, 0] = False
    sinks = torch.randn(HQ).to(case["dtype"]) if case["sinks"] else None
    return q, parted, keys, values, mask, sinks


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=20)
@given(cases())
def test_as_if_the_keys_lay_together(way: str, case: dict[str, Any]) -> None:
    q, parted, k, v, mask, sinks = build(case)
    options = {"scale": 0.3, "causal": mask is None, "softcap": case["softcap"]}
    out = WAYS[way](q, parted, mask=mask, sinks=sinks, **options)
    wide: list[Any] = [None if t is None else t.double() for t in (q, k, v, sinks)]
    ref = grouped_decode_reference(wide[0], wide[1], wide[2], mask=mask, sinks=wide[3], **options)[0]
    low = grouped_decode_reference(q, k, v, mask=mask, sinks=sinks, **options)[0]
    assert out.dtype == q.dtype
    assert_conforms(out, low, ref)


@pytest.mark.parametrize("way", WAYS)
def test_what_nobody_sees_does_not_leak(way: str) -> None:
    case = {"rows": [0, 0, 1], "count": 2, "kv_heads": 1, "group": 2, "queries": 1, "dim": 8, "value_dim": 8}
    case |= {"shared": [20], "own": 5, "masked": "one", "softcap": None, "sinks": False, "seed": 0}
    case["dtype"] = torch.float32
    q, parted, k, v, _, _ = build(case)
    mask = torch.ones(3, 1, 1, 25, dtype=torch.bool)
    mask[2, ..., :7] = False  # the second prompt is padded on the left
    expected = grouped_decode_reference(q.double(), k.double(), v.double(), scale=1.0, causal=False, mask=mask)[0]
    for tensor in parted.shared[0][:2]:
        tensor[1, :, :7] = float("nan")
    out = WAYS[way](q, parted, scale=1.0, mask=mask)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [[0, 0, 1, 1], [1, 0, 0, 1, 0]])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("differ", [(), (1,), (0, 1)], ids=["alike", "one prompt's rows differ", "all differ"])
def test_a_mask_that_rows_of_a_prompt_have_in_common(rows: list[int], queries: int, differ: tuple[int, ...]) -> None:
    """Read once for all of them where it is so; for the prompts where it is not, a row for each."""
    case = {"rows": rows, "count": 2, "kv_heads": 2, "group": 2, "queries": queries, "dim": 8, "value_dim": 8}
    case |= {"shared": [50], "own": 6, "masked": "", "softcap": None, "sinks": True, "seed": 5, "dtype": torch.float32}
    q, parted, k, v, _, sinks = build(case)
    padding = torch.tensor([4, 17])[rows]
    mask = (torch.arange(56) >= padding[:, None])[:, None, None].repeat(1, 1, queries, 1)
    for row, part in enumerate(rows):
        if part in differ:
            mask[row, 0, :, 20 + row : 30] = False
    wide = [t.double() for t in (q, k, v, sinks)]  # type: ignore[union-attr]
    ref = grouped_decode_reference(*wide[:3], scale=0.3, causal=False, mask=mask, sinks=wide[3])[0]
    out = shared_decode(q, parted, scale=0.3, mask=mask, sinks=sinks)
    torch.testing.assert_close(out.double(), ref, rtol=1e-4, atol=1e-5)


def test_rows_put_in_another_order() -> None:
    rows = Rows([0, 0, 1, 1], 2)
    assert rows.select([1, 0, 2, 2]) is rows  # beams stay with their prompt: nothing that a recording knows changes
    assert rows.select([3, 0]).of == (1, 0)
    assert not rows.select([3, 0]).even


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [[0, 0, 1, 1], [1, 0, 0]])
def test_long_parts_with_a_mask(way: str, rows: list[int]) -> None:
    """Where a mask begins and ends is found on the device, once for all layers; with and without what is shared."""
    case = {"rows": rows, "count": 2, "kv_heads": 1, "group": 2, "queries": 1, "dim": 8, "value_dim": 8, "seed": 3}
    case |= {"shared": [1100], "own": 1060, "masked": "", "softcap": None, "sinks": True, "dtype": torch.float32}
    q, parted, k, v, _, sinks = build(case)
    own = torch.arange(1060) < 700
    for padding in (0, 300):
        mask = torch.cat([torch.arange(1100) >= padding, own])[None, None, None].expand(len(rows), -1, -1, -1).clone()
        wide = [t.double() for t in (q, k, v, sinks)]  # type: ignore[union-attr]
        ref = grouped_decode_reference(*wide[:3], scale=0.3, causal=False, mask=mask, sinks=wide[3])[0]
        for _ in range(2):  # the second layer finds it
            out = WAYS[way](q, parted, scale=0.3, mask=mask, all_shared=padding == 0, sinks=sinks)
            torch.testing.assert_close(out.double(), ref, rtol=1e-4, atol=1e-5)


def test_its_kernels_are_operators_where_operators_are_written_down() -> None:
    """A recorded step is written down as operators (``decoding/tape.py``), and nothing else is run again."""
    torch.manual_seed(0)
    rows = [0, 0, 1, 1, 1]
    q = torch.randn(5, 4, 1, 16, device=interpreter.DEVICE)
    shared, own = ([torch.randn(n, 2, S, 16, device=interpreter.DEVICE) for _ in "kv"] for n, S in ((2, 40), (5, 9)))
    parted = Parted((SharedPart(shared[0], shared[1], Rows(rows, 2)),), own[0], own[1])
    mask = torch.rand(5, 1, 1, 49, device=interpreter.DEVICE) < 0.8
    for seen in (None, mask):
        expected = shared_decode(q, parted, scale=0.3, causal=seen is None, mask=seen)
        with torch.no_grad(), Tape() as tape:
            out = shared_decode(q, parted, scale=0.3, causal=seen is None, mask=seen)
        assert torch.equal(out, expected)
        assert tape.why_not([out]) is None
        slot = tape.slot_of(out)
        assert slot is not None
        q.mul_(-1)  # the same operators on other numbers
        again = Program(tape.ops, tape, [slot]).run()[0]
        assert torch.equal(again, shared_decode(q, parted, scale=0.3, causal=seen is None, mask=seen))
        assert not torch.equal(again, out)
