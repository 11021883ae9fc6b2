"""The decode kernels on a GPU: the conformance sweep, in bf16 too, and what the interpreter cannot show."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conformance import assert_conforms

pytest.importorskip("triton")

from hf_attn_patch.attn.kernels import decode, decode_launch
from hf_attn_patch.attn.kernels.decode import grouped_decode, grouped_decode_paged
from hf_attn_patch.attn.kernels.decode_plan import Tuning
from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_paged_reference, grouped_decode_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [(1, 1), (3, 3), (1, 128), (1, 339), (3, 799), (16, 20000), (1, 131072)]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def poisoned(q: torch.Tensor, dv: int) -> None:
    """Leave NaN in the blocks that the allocator will hand out for the output."""
    B, HQ, Sq, _ = q.shape
    for shape, dtype in (((B, Sq, HQ, dv), q.dtype), ((B, HQ, Sq), torch.float32)):
        block = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
        del block


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"scale": q.shape[-1] ** -0.5, **options}
    poisoned(q, v.shape[-1])
    out, lse = grouped_decode(q, k, v, **options, return_lse=True)
    for _ in range(2):
        again, lse_again = grouped_decode(q, k, v, **options, return_lse=True)
        assert torch.equal(out, again)
        assert torch.equal(lse, lse_again)
    low, _ = grouped_decode_reference(q, k, v, **options)
    wide = torch.float64 if q.dtype == torch.float32 else torch.float32
    ref, ref_lse = grouped_decode_reference(q.to(wide), k.to(wide), v.to(wide), **options)
    assert_conforms(out, low, ref)
    torch.testing.assert_close(lse.double(), ref_lse.double(), rtol=1e-4, atol=1e-2 if q.dtype.itemsize == 2 else 1e-4)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256, 512])
def test_head_dims(D: int, dtype: torch.dtype) -> None:
    for (HQ, HKV), (Sq, Sk) in itertools.product([(4, 4), (8, 2), (8, 1)], [(1, 339), (3, 799)]):
        check(randn(2, HQ, Sq, D, dtype=dtype), *(randn(2, HKV, Sk, D, dtype=dtype, seed=i) for i in (1, 2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("Sq", "Sk"), LENGTHS)
def test_lengths_and_groupings(Sq: int, Sk: int, dtype: torch.dtype) -> None:
    for HQ, HKV in [(4, 4), (32, 8), (32, 1)] if Sk < 10000 else [(8, 2), (16, 1)]:
        q = randn(2, HQ, Sq, 128, dtype=dtype)
        k, v = (randn(2, HKV, Sk, 128, dtype=dtype, seed=i) for i in (1, 2))
        check(q, k, v)
        first = torch.tensor([Sk // 3, 0], dtype=torch.int32, device="cuda")
        end = torch.tensor([Sk, Sk - Sk // 4], dtype=torch.int32, device="cuda")
        keys = torch.arange(Sk, device="cuda")
        padding = ((keys < first[:, None]) | (keys >= end[:, None]))[:, None, :, None]
        check(q, k.masked_fill(padding, float("nan")), v.masked_fill(padding, float("nan")), first=first, end=end)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [None, 15.0, 50.0])
@pytest.mark.parametrize("window", [None, 100, 4096])
def test_options(window: int | None, softcap: float | None, dtype: torch.dtype) -> None:
    for Sq, (HQ, HKV) in itertools.product((1, 4, 16), [(8, 8), (8, 2), (32, 1)]):
        q = randn(3, HQ, Sq, 64, dtype=dtype)
        k, v = randn(3, HKV, 5000, 64, dtype=dtype, seed=1), randn(3, HKV, 5000, 96, dtype=dtype, seed=2)
        end = torch.tensor([5000, 17, 3333], dtype=torch.int32, device="cuda")
        sinks = randn(HQ, dtype=torch.float32)
        check(q, k, v, window=window, softcap=softcap)
        check(q, k, v, window=window, softcap=softcap, sinks=sinks, end=end)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("Sq", [1, 4])
def test_masks_and_biases(Sq: int, dtype: torch.dtype) -> None:
    B, HQ, HKV, Sk = 3, 8, 2, 2100
    q = randn(B, HQ, Sq, 128, dtype=dtype)
    k, v = (randn(B, HKV, Sk, 128, dtype=dtype, seed=i) for i in (1, 2))
    for shape in ((B, 1, 1, Sk), (1, 1, Sq, Sk), (B, HQ, Sq, Sk), (1, HQ, 1, Sk), (B, 1, 1, 1)):
        mask = randn(*shape, dtype=torch.float32) > 0.3
        mask[0, ..., 900:] = False
        hidden = ~mask.expand(B, HQ, Sq, Sk).unflatten(1, (HKV, HQ // HKV)).any(2).any(2)[..., None]
        masked = [t.masked_fill(hidden, float("nan")) for t in (k, v)]
        check(q, *masked, mask=mask, causal=False)
        bias = randn(*shape, dtype=dtype, seed=3)
        check(q, k, v, bias=bias)
        check(q, *masked, bias=bias.masked_fill(~mask, float("-inf")), causal=False)
    nothing = torch.zeros(B, 1, Sq, Sk, dtype=torch.bool, device="cuda")
    assert not check(q, k, v, mask=nothing, causal=False).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_of_the_cache(dtype: torch.dtype) -> None:
    q, k, v = randn(3, 8, 2, 128, dtype=dtype), *(randn(3, 2, 1000, 128, dtype=dtype, seed=i) for i in (1, 2))
    want = check(q, k, v)
    wide = torch.full((3, 1501, 2, 2, 200), float("nan"), dtype=dtype, device="cuda")
    for offset in (0, 8, 3):  # 3: rows that are not aligned to 16 bytes
        views = [wide[:, 501:, i, :, offset : offset + 128].transpose(1, 2) for i in (0, 1)]
        for view, t in zip(views, (k, v), strict=True):
            view.copy_(t)
        assert_conforms(grouped_decode(q, *views, scale=128**-0.5), want, want)  # type: ignore[arg-type]
    check(q, k.mT.contiguous().mT, v)
    check(q, k[:1, :1].expand(3, 2, 1000, 128), v)


def test_beyond_32_bit_offsets() -> None:
    k = torch.empty(2, 2, (1 << 23) + 100, 128, dtype=torch.bfloat16, device="cuda")
    v = torch.empty_like(k)
    first = torch.full((2,), (1 << 23) - 900, dtype=torch.int32, device="cuda")
    for i, t in enumerate((k, v)):
        t[:, :, :-1000] = float("nan")
        t[:, :, -1000:] = randn(2, 2, 1000, 128, seed=i)
    q = randn(2, 4, 1, 128)
    tails = [t[:, :, -1000:].clone() for t in (k, v)]
    low, ref = (
        grouped_decode_reference(q.to(d), *(t.to(d) for t in tails), scale=0.1)[0] for d in (q.dtype, torch.float)
    )
    assert_conforms(grouped_decode(q, k, v, first=first, scale=0.1), low, ref)  # type: ignore[arg-type]
    rows = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k[:1], v[:1])]
    assert_conforms(grouped_decode(q[:1], *rows, first=first[:1], scale=0.1), low[:1], ref[:1])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [16, 64, 256])
def test_paged(page: int, dtype: torch.dtype) -> None:
    B, HKV, most = 4, 2, 4096 // page
    generator = torch.Generator().manual_seed(page)
    pages = torch.full((B * most, page, 2, HKV, 128), float("nan"), dtype=dtype, device="cuda")
    table = torch.randperm(B * most, generator=generator).view(B, most).to("cuda", torch.int32)
    lengths = torch.tensor([4096, 1, 1777, 0], dtype=torch.int32, device="cuda")
    for b, length in enumerate(lengths.tolist()):
        for i in range(-(-length // page)):
            n = min(page, length - i * page)
            pages[int(table[b, i]), :n] = randn(n, 2, HKV, 128, dtype=dtype, seed=i)
    k, v = pages.unbind(2)
    for Sq in (1, 4):
        q = randn(B, 8, Sq, 128, dtype=dtype)
        both: tuple[dict[str, Any], ...] = ({}, {"window": 300})
        for options in both:
            args = (table, lengths)
            out = grouped_decode_paged(q, k, v, *args, scale=0.09, **options)  # type: ignore[arg-type]
            low, _ = grouped_decode_paged_reference(q, k, v, *args, scale=0.09, **options)
            q64, k64, v64 = (t.double() for t in (q, k, v))
            ref, _ = grouped_decode_paged_reference(q64, k64, v64, *args, scale=0.09, **options)
            assert_conforms(out, low, ref)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tuning",
    [
        Tuning(block_n=64, direct=False, least=1),
        Tuning(block_n=64, direct=True),
        Tuning(block_n=64, pdl=True, waves=3),
        Tuning(block_n=32, stages=4, registers=168, per_sm=3),
        Tuning(block_n=64, block_m=64, lazy_sum=False),
        Tuning(block_n=64, warps=8, evict="evict_first"),
    ],
    ids=str,
)
def test_tunings(tuning: Tuning) -> None:
    q, k, v = randn(5, 16, 2, 128), *(randn(5, 2, 3000, 128, seed=i) for i in (1, 2))
    first = torch.tensor([0, 2999, 1500, 10, 3000], dtype=torch.int32, device="cuda")
    low, _ = grouped_decode_reference(q, k, v, first=first, scale=0.1)
    ref, ref_lse = grouped_decode_reference(q.float(), k.float(), v.float(), first=first, scale=0.1)
    poisoned(q, 128)
    operands = decode.DecodeOperands(
        q, k, v, None, first, None, None, None, None, None, None, 0.1, True, None, None, True
    )
    out, lse = decode.launch(operands, tuning)
    assert_conforms(out, low, ref)
    torch.testing.assert_close(lse, ref_lse, rtol=1e-3, atol=1e-3)


def test_cuda_graph_follows_the_lengths() -> None:
    q, k, v = randn(2, 8, 1, 128), *(randn(2, 2, 4096, 128, seed=i) for i in (1, 2))
    end = torch.tensor([4096, 100], dtype=torch.int32, device="cuda")
    grouped_decode(q, k, v, scale=0.1, end=end)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grouped_decode(q, k, v, scale=0.1, end=end)
    for ends in ([4096, 100], [1, 4000], [0, 17]):
        end.copy_(torch.tensor(ends))
        graph.replay()
        ref, _ = grouped_decode_reference(q.float(), k.float(), v.float(), scale=0.1, end=end)
        torch.testing.assert_close(out.float(), ref, rtol=2e-2, atol=2e-2)  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_whole(mode: str) -> None:
    k, v = (randn(2, 2, 4096, 128, seed=i) for i in (1, 2))

    @torch.compile(fullgraph=True, mode=mode)
    def step(q: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return grouped_decode(2 * q, k, v, scale=0.05, end=end) + 1  # type: ignore[operator]

    for seed, ends in enumerate(([5, 9], [4096, 1], [100, 4000], [7, 7])):
        q, end = randn(2, 8, 1, 128, seed=seed), torch.tensor(ends, dtype=torch.int32, device="cuda")
        with torch.no_grad():
            out = step(q, end).clone()
        ref, _ = grouped_decode_reference(q.float(), k.float(), v.float(), scale=0.1, end=end)
        torch.testing.assert_close(out.float(), ref + 1, rtol=2e-2, atol=2e-2)


def test_growing_length_compiles_nothing_new() -> None:
    from hf_attn_patch.attn.kernels.combine_kernel import combine_kernel
    from hf_attn_patch.attn.kernels.decode_kernel import decode_kernel

    q, k, v = randn(1, 8, 1, 128), *(randn(1, 2, 4096, 128, seed=i) for i in (1, 2))
    grouped_decode(q, k[:, :, :2000], v[:, :, :2000], scale=0.1)

    def compiled() -> int:
        return sum(len(kernel.device_caches[0][0]) for kernel in (decode_kernel, combine_kernel))

    before = compiled()
    for length in range(2001, 2050):
        grouped_decode(q, k[:, :, :length], v[:, :, :length], scale=0.1)
    assert compiled() == before


def test_known_calls_do_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    from hf_attn_patch.attn.kernels.combine_kernel import combine_kernel
    from hf_attn_patch.attn.kernels.decode_kernel import decode_kernel

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("bound again")

    q, k, v = randn(1, 8, 1, 128), *(randn(1, 2, 4096, 128, seed=i) for i in (1, 2))
    lengths = (300, 4096, 4095)  # one kernel, two kernels, and two of a kind that is known
    want = [grouped_decode(q, k[:, :, :n], v[:, :, :n], scale=0.1) for n in lengths]
    decode_launch._launches.pop(list(decode_launch._launches)[-1])
    for kernel in (decode_kernel, combine_kernel):
        monkeypatch.setattr(kernel, "run", never)
    for _ in range(2):
        for n, before in zip(lengths, want, strict=True):
            assert torch.equal(grouped_decode(q, k[:, :, :n], v[:, :, :n], scale=0.1), before)  # type: ignore[arg-type]

    started: list[Any] = []
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [started.append])
    assert torch.equal(grouped_decode(q, k, v, scale=0.1), want[1])  # type: ignore[arg-type]
    assert [metadata.get()["name"] for metadata in started] == ["decode_kernel", "combine_kernel"]


def test_side_stream() -> None:
    q, k, v = randn(1, 8, 1, 128), *(randn(1, 2, 4096, 128, seed=i) for i in (1, 2))
    want = grouped_decode(q, k, v, scale=0.1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = grouped_decode(q, k, v, scale=0.1)
    stream.synchronize()
    assert torch.equal(got, want)  # type: ignore[arg-type]
