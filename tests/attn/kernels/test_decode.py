"""The decode kernels against their plain truth, by Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest
import torch
from conformance import assert_conforms
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from hf_attn_patch.attn.kernels import decode
from hf_attn_patch.attn.kernels.decode import grouped_decode, grouped_decode_paged, mask_bounds
from hf_attn_patch.attn.kernels.decode_plan import Tuning, choose, plan
from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_paged_reference, grouped_decode_reference

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("HQ", "HKV"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(("Sq", "Sk"), [(1, 75), (3, 3)])
def test_groupings(dtype: torch.dtype, HQ: int, HKV: int, Sq: int, Sk: int) -> None:
    check(*inputs(1, HQ, HKV, Sq, Sk, 32, dtype=dtype))


@pytest.mark.parametrize(("D", "DV"), [(40, 40), (59, 59), (80, 64), (64, 111), (512, 512)])
def test_head_dims(D: int, DV: int) -> None:
    check(*inputs(1, 2, 1, 1, 40, D, DV, torch.float16))


@pytest.mark.parametrize("Sq", [1, 3])
@pytest.mark.parametrize(
    ("first", "end"),
    [
        ((0, 69, 50), None),
        (None, (70, 1, 37)),
        ((10, 0, 50), (60, 64, 50)),
        ((7, 0, 0), (3, 0, 0)),
    ],
    ids=["left", "right", "both", "empty rows"],
)
def test_padding_is_never_read(Sq: int, first: tuple[int, ...] | None, end: tuple[int, ...] | None) -> None:
    q, k, v = inputs(3, 2, 1, Sq, 70, 16)
    ranges: dict[str, Any] = {"first": ints(*first) if first else None, "end": ints(*end) if end else None}
    begin = ranges["first"] if first else torch.zeros(3, device=DEVICE)
    stop = ranges["end"] if end else torch.full((3,), 70, device=DEVICE)
    keys = torch.arange(70, device=DEVICE)
    padding = ((keys < begin[:, None]) | (keys >= stop[:, None]))[:, None, :, None]
    out, lse = check(q, k.masked_fill(padding, float("nan")), v.masked_fill(padding, float("inf")), **ranges)
    for b in range(3):
        if begin[b] >= stop[b]:
            assert torch.equal(out[b], torch.zeros_like(out[b]))
            assert torch.equal(lse[b], torch.full_like(lse[b], float("-inf")))


@pytest.mark.parametrize("Sq", [1, 4])
@pytest.mark.parametrize(("window", "padded"), [(1, False), (33, False), (5, True), (1000, True)])
def test_window(Sq: int, window: int, padded: bool) -> None:
    ends: dict[str, Any] = {"first": ints(3, 50), "end": ints(60, 75)} if padded else {}
    check(*inputs(2, 2, 1, Sq, 75, 16), window=window, **ends)


def test_window_reads_nothing_else() -> None:
    q, k, v = inputs(1, 2, 1, 2, 90, 32)
    k[:, :, : 90 - 2 - 10 + 1] = float("nan")
    v[:, :, : 90 - 2 - 10 + 1] = float("nan")
    check(q, k, v, window=10)


@pytest.mark.parametrize("Sq", [1, 3])
@pytest.mark.parametrize("kind", ["keys", "rows", "heads", "all false", "broadcast"])
def test_bool_mask(Sq: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind != "rows":
        monkeypatch.setattr(decode, "SHORT", 16)  # look for the mask's bounds first
    B, HQ, Sk = 2, 4, 70
    q, k, v = inputs(B, HQ, 2, Sq, Sk, 32)
    shape = {"keys": (B, 1, 1, Sk), "heads": (B, HQ, Sq, Sk), "broadcast": (1, 1, Sq, 1)}.get(kind, (B, 1, Sq, Sk))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)).to(DEVICE) > 0.6
    mask[0, ..., 40:] = False
    if kind == "all false":
        mask[1] = False
    hidden = ~mask.expand(B, HQ, Sq, Sk).unflatten(1, (2, 2)).any(2).any(2)[..., None]
    out, _ = check(q, k.masked_fill(hidden, float("nan")), v.masked_fill(hidden, float("nan")), mask=mask, causal=False)
    if kind == "all false":
        assert torch.equal(out[1], torch.zeros_like(out[1]))


@pytest.mark.parametrize("Sq", [1, 2])
@pytest.mark.parametrize("shape", [(2, 1, 1, 60), (1, 4, 2, 60)], ids=str)
def test_bias(Sq: int, shape: tuple[int, ...]) -> None:
    q, k, v = inputs(2, 4, 2, Sq, 60, 16)
    bias = 3 * torch.randn(*shape[:2], min(shape[2], Sq), 60, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    bias[..., 20:50] = float("-inf")
    k[:, :, 20:50] = v[:, :, 20:50] = float("nan")
    check(q, k, v, bias=bias)
    check(q, k, v, bias=bias, causal=False, mask=torch.arange(60, device=DEVICE).expand(2, 1, Sq, 60) % 3 > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("HKV", [4, 1])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("hidden_by", ["mask", "bias", "mask and bias", "lowest number", "mask and lowest number"])
def test_what_is_hidden_for_several_reasons_together(dtype, HKV, window, hidden_by) -> None:  # type: ignore[no-untyped-def]
    """Causality hides a key from the early queries, and a mask or bias from the late ones: so nobody sees it."""
    B, HQ, Sq, Sk, lowest = 2, 4, 5, 40, torch.finfo(dtype).min
    q, k, v = inputs(B, HQ, HKV, Sq, Sk, 16, dtype=dtype)
    g = torch.Generator().manual_seed(3)
    by_mask, by_bias = (torch.rand(B, HQ, Sq, Sk, generator=g).to(DEVICE) < 0.6 for _ in range(2))
    options: dict[str, Any] = {"window": window}
    own = torch.ones(Sq, Sk, dtype=torch.bool, device=DEVICE).tril(Sk - Sq)
    if window is not None:
        own = own & ~own.tril(Sk - Sq - window)
    for by in (by_mask, by_bias):
        by[..., -2:, Sk - 2] = False
        by[..., Sk - Sq] = True  # every row sees one: under the lowest number alone it would have a mean of all
    see = own.expand(B, HQ, Sq, Sk)
    if "mask" in hidden_by:
        options["mask"], see = by_mask, see & by_mask
    if hidden_by != "mask":
        options["bias"] = torch.randn(B, HQ, Sq, Sk, generator=g).to(DEVICE, dtype)
        options["bias"] = options["bias"].masked_fill(~by_bias, lowest if "lowest" in hidden_by else float("-inf"))
        see = see & by_bias
    unseen = ~see.unflatten(1, (HKV, HQ // HKV)).any(2).any(2)[..., None]
    assert unseen[:, :, Sk - 2].all()
    clean, lse = check(q, k, v, **options)
    dirty = run(q, k.masked_fill(unseen, float("nan")), v.masked_fill(unseen, float("inf")), **options)
    assert torch.equal(dirty[0], clean) and torch.equal(dirty[1], lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_softcap_sinks_and_everything(dtype: torch.dtype) -> None:
    q, k, v = inputs(3, 4, 2, 2, 60, 48, 32, dtype)
    sinks = torch.tensor([1.0, -2.0, float("-inf"), 30.0], device=DEVICE)
    ends: dict[str, Any] = {"first": ints(0, 20, 60), "end": ints(60, 45, 60)}
    check(q, k, v, softcap=15.0)
    check(q, k, v, sinks=sinks)
    check(q, k, v, softcap=5.0, sinks=sinks, window=30, **ends)


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


def test_non_causal() -> None:
    check(*inputs(2, 4, 4, 3, 70, 32), causal=False, end=ints(70, 33))


@pytest.mark.parametrize(("Sq", "page"), [(1, 16), (1, 48), (3, 16), (1, 128), (2, 256)])
def test_paged(Sq: int, page: int) -> None:
    B, HQ, HKV, D, most = 3, 4, 2, 32, 6
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(B, HQ, Sq, D, generator=generator).to(DEVICE)
    pages = torch.full((40, page, 2, HKV, D), float("nan"), device=DEVICE)
    lengths = ints(page * 6, 5, page * 2 + 1)
    table = torch.full((B, most), 10**6, dtype=torch.int32)  # no page: reading it would fail
    free = torch.randperm(40, generator=generator).tolist()
    for b, length in enumerate(lengths.tolist()):
        for i in range(-(-length // page)):
            table[b, i] = free.pop()
            n = min(page, length - i * page)
            pages[table[b, i], :n] = torch.randn(n, 2, HKV, D, generator=generator).to(DEVICE)
    table = table.to(DEVICE)
    k, v = pages.unbind(2)
    both: tuple[dict[str, Any], ...] = ({}, {"window": 20, "softcap": 10.0, "sinks": torch.ones(HQ, device=DEVICE)})
    for options in both:
        args = (q, k, v, table, lengths)
        out, lse = grouped_decode_paged(*args, scale=0.2, return_lse=True, **options)
        ref, ref_lse = grouped_decode_paged_reference(*args, scale=0.2, **options)
        torch.testing.assert_close(out, ref, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(lse, ref_lse, rtol=1e-5, atol=1e-5)


def test_reference_is_torch_sdpa() -> None:
    q, k, v = inputs(2, 4, 2, 3, 20, 16)
    keys = torch.arange(20, device=DEVICE)
    visible = (keys <= 17 + torch.arange(3, device=DEVICE)[:, None]) & (
        keys > 17 - 6 + torch.arange(3)[:, None].to(DEVICE)
    )
    mask = torch.zeros(3, 20, device=DEVICE).masked_fill(~visible, float("-inf")) + 0.1 * keys
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
    got, _ = grouped_decode_reference(q, k, v, scale=0.3, window=6, bias=(0.1 * keys).expand(2, 4, 3, 20))
    torch.testing.assert_close(got, want)


@settings(max_examples=150 if DEVICE == "cuda" else 8, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    HKV=st.integers(1, 2),
    G=st.integers(1, 3),
    Sq=st.integers(1, 4),
    Sk=st.integers(1, 90),
    data=st.data(),
)
def test_any_shape(B: int, HKV: int, G: int, Sq: int, Sk: int, data: st.DataObject) -> None:
    bound = st.lists(st.integers(0, Sk), min_size=B, max_size=B)
    window = data.draw(st.none() | st.integers(1, 150))
    least = data.draw(st.integers(1, 3))
    check(
        *inputs(B, HKV * G, HKV, Sq, Sk, 16),
        Tuning(block_n=16, least=least, direct=data.draw(st.sampled_from([None, False]))),
        first=ints(*data.draw(bound)),
        end=ints(*data.draw(bound)),
        window=window,
    )


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("Sq", [17, 64])
def test_a_tree_of_queries(Sq: int, dtype: torch.dtype) -> None:
    """What speculative decoding asks: each of up to 64 new tokens sees the cache, its ancestors and itself."""
    Sk = Sq + 83
    parent = [(i - 1) // 3 for i in range(Sq)]  # three children each; the first is the root
    mask = torch.zeros(1, 1, Sq, Sk, dtype=torch.bool)
    mask[..., :83] = True
    for i in range(Sq):
        j = i
        while j >= 0:
            mask[0, 0, i, 83 + j] = True
            j = parent[j] if j else -1
    check(*inputs(2, 6, 2, Sq, Sk, 32, dtype=dtype), mask=mask.to(DEVICE).expand(2, 6, -1, -1), causal=False)


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
