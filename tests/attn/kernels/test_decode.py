"""The decode kernels against their plain truth, by Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from decode_checks import DEVICE, check, inputs, ints, run

from hf_attn_patch.attn.kernels import decode_launch
from hf_attn_patch.attn.kernels.decode import grouped_decode_paged, mask_words
from hf_attn_patch.attn.kernels.decode_plan import Tuning
from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_paged_reference, grouped_decode_reference


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
@pytest.mark.parametrize("kind", ["keys", "rows", "short rows", "heads", "all false", "broadcast"])
def test_bool_mask(Sq: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind != "short rows":
        monkeypatch.setattr(decode_launch, "SHORT", 16)  # make words of it, and look for its bounds first
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


@pytest.mark.parametrize(("Sq", "causal", "batch"), [(20, False, 1), (64, True, 2)])
def test_mask_in_words(Sq: int, causal: bool, batch: int) -> None:
    """A tree's mask: every query its own keys, told by a number a key; what nobody sees is not read."""
    q, k, v = inputs(2, 4, 2, Sq, 130, 16)
    mask = torch.rand(batch, 1, Sq, 130, generator=torch.Generator().manual_seed(5)).to(DEVICE) > 0.7
    mask[0, :, :, 30:90] = False
    words = mask_words(mask)
    told = [[[bool(w >> i & 1) for w in row] for i in range(Sq)] for row in words[:, 0, 0].tolist()]
    assert torch.equal(torch.tensor(told)[:, None], mask.cpu())
    seen = mask & mask.new_ones(Sq, 130).tril(130 - Sq) if causal else mask
    hidden = ~seen.expand(2, 1, Sq, 130).any(2)[..., None]
    k, v = (t.masked_fill(hidden, float("nan")) for t in (k, v))
    by_mask, _ = check(q, k, v, mask=mask, causal=causal)
    assert torch.equal(run(q, k, v, mask=words, causal=causal)[0], by_mask)
    with pytest.raises(ValueError, match="words of a mask are"):
        run(q, k, v, mask=words[..., 1:])


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
