"""The decode kernel on codes of 8 bits, against fp64 attention on the numbers that they stand for."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest
import torch
from conformance import assert_conforms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from hf_attn_patch.attn.codes import KINDS, pack
from hf_attn_patch.attn.kernels import decode
from hf_attn_patch.attn.kernels.decode import grouped_decode
from hf_attn_patch.attn.kernels.decode_plan import Tuning
from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_reference
from hf_attn_patch.attn.kernels.pack_codes import packed

DEVICE = interpreter.DEVICE
SMALL = Tuning(block_n=16, least=2)
CODES = [torch.int8, torch.float8_e4m3fn]
PAIRS = [(codes, codes) for codes in CODES] + [(torch.int8, torch.float8_e4m3fn)]
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else [])]
Coded = tuple[torch.Tensor, torch.Tensor]
Pair = tuple[torch.dtype, torch.dtype]


def random_codes(*shape: int, dtype: torch.dtype, spread: float = 4.0) -> Coded:
    """Codes of every value, NaN left out, and scales that differ by up to ``10 ** spread``."""
    generator = torch.Generator().manual_seed(sum(shape))
    bits = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int16).to(torch.int8)
    if dtype == torch.float8_e4m3fn:
        bits = torch.where((bits & 0x7F) == 0x7F, bits - 1, bits)  # the two codes of NaN
    scales = 10 ** (-spread * torch.rand(shape[:-1], generator=generator)) / (127 if dtype == torch.int8 else 448)
    return bits.view(dtype).to(DEVICE), scales.to(DEVICE)


def numbers(coded: Coded) -> torch.Tensor:
    codes, scales = coded
    return codes.double() * scales.double()[..., None]


def check(q: torch.Tensor, k: Coded, v: Coded, tuning: Tuning | None = SMALL, **options: Any) -> torch.Tensor:
    options = {"scale": q.shape[-1] ** -0.5, **options}
    defaults: dict[str, Any] = dict.fromkeys(decode.DecodeOperands._fields[3:]) | {"causal": True, "return_lse": True}
    tensors = {"q": q, "k": k[0], "v": v[0], "k_scale": k[1], "v_scale": v[1]}
    out, lse = decode.launch(decode.DecodeOperands(**{**defaults, **tensors, **options}), tuning)
    keys, values = numbers(k), numbers(v)
    low, _ = grouped_decode_reference(q, keys.to(q.dtype), values.to(q.dtype), **options)
    ref, ref_lse = grouped_decode_reference(q.double(), keys, values, **options)
    assert out.dtype == q.dtype
    assert lse is not None
    assert_conforms(out, low, ref)
    torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-3, atol=1e-5 if q.dtype == torch.float32 else 2e-3)
    return out


def case(
    B: int, HQ: int, HKV: int, Sq: int, Sk: int, D: int, DV: int, dtype: torch.dtype, codes: torch.dtype | Pair,
) -> tuple[torch.Tensor, Coded, Coded]:  # fmt: skip
    of_keys, of_values = codes if isinstance(codes, tuple) else (codes, codes)
    q = torch.randn(B, HQ, Sq, D, generator=torch.Generator().manual_seed(Sk)).to(DEVICE, dtype)
    return q, random_codes(B, HKV, Sk, D, dtype=of_keys), random_codes(B, HKV, Sk, DV, dtype=of_values)


@pytest.mark.parametrize("codes", CODES)
def test_every_code_is_read_exactly(codes: torch.dtype) -> None:
    """One key: attention is its value. All 256 codes (254 of fp8) come out as torch converts them."""
    values = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(codes).to(DEVICE)
    known = values.float().isfinite()
    v = torch.where(known, values.view(torch.int8), 0).view(codes).view(1, 1, 1, 256)
    k, one = torch.zeros(1, 1, 1, 16, dtype=torch.int8, device=DEVICE).view(codes), torch.ones(1, 1, 1, device=DEVICE)
    for dtype in DTYPES:
        q = torch.ones(1, 1, 1, 16, device=DEVICE, dtype=dtype)
        out = grouped_decode(q, k, v, scale=1.0, k_scale=one, v_scale=one)
        assert isinstance(out, torch.Tensor)
        assert torch.equal(out.flatten().float(), v.flatten().float())


@pytest.mark.parametrize("codes", PAIRS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=6 if DEVICE == "cpu" else 3, deadline=None)  # a GPU compiles for each
@given(
    B=st.integers(1, 3), HKV=st.integers(1, 2), G=st.sampled_from([1, 3, 4]), Sq=st.sampled_from([1, 1, 3]),
    Sk=st.integers(3, 90), D=st.sampled_from([16, 40, 64]), DV=st.sampled_from([16, 24, 33]),
)  # fmt: skip
def test_shapes(
    dtype: torch.dtype,
    codes: Pair,
    B: int,
    HKV: int,
    G: int,
    Sq: int,
    Sk: int,
    D: int,
    DV: int,
) -> None:
    check(*case(B, G * HKV, HKV, Sq, Sk, D, DV, dtype, codes))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("codes", [*(pytest.param(p, marks=pytest.mark.slow) for p in PAIRS[:-1]), PAIRS[-1]], ids=str)
@pytest.mark.parametrize(
    "what", ["left", "right", "window", "softcap", "sinks", "mask", "bias", "lowest bias", "empty rows"]
)
def test_options(codes: Pair, what: str) -> None:
    """And what lies where nobody looks is not read: scales of NaN there change nothing."""
    q, k, v = case(3, 4, 2, 2, 70, 32, 32, torch.float16, codes)
    options: dict[str, Any] = {}
    hidden = torch.zeros(3, 1, 70, dtype=torch.bool, device=DEVICE)
    keys = torch.arange(70, device=DEVICE)
    if what in ("left", "right", "empty rows"):
        options["first"] = ints(*{"left": (0, 69, 50), "empty rows": (7, 0, 70)}.get(what, (0, 0, 0)))
        options["end"] = ints(*{"right": (70, 2, 37), "empty rows": (3, 0, 70)}.get(what, (70, 70, 70)))
        hidden |= (keys < options["first"][:, None, None]) | (keys >= options["end"][:, None, None])
    elif what == "window":
        options["window"] = 20
        hidden |= keys < 70 - 21
    elif what == "softcap":
        options["softcap"] = 3.0
    elif what == "sinks":
        options["sinks"] = torch.randn(4, device=DEVICE, dtype=torch.float16)
    elif what == "mask":
        seen = torch.rand(3, 1, 2, 70, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.5
        options |= {"mask": seen, "causal": False}
        hidden |= ~seen.any(2)
    else:
        bias = torch.randn(1, 4, 2, 70, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        low = float("-inf") if what == "bias" else torch.finfo(torch.float32).min
        bias[..., 30:40] = low
        hidden |= (keys >= 30) & (keys < 40)
        options["bias"] = bias
    k, v = ((c, s.masked_fill(hidden, float("nan"))) for c, s in (k, v))
    if what == "lowest bias":  # the plain truth reads such keys: numbers there, and NaN for the kernel alone
        plain = [(c, torch.nan_to_num(s)) for c, s in (k, v)]
        out = grouped_decode(q, k[0], v[0], scale=32**-0.5, k_scale=k[1], v_scale=v[1], **options)
        ref, _ = grouped_decode_reference(q.double(), *map(numbers, plain), scale=32**-0.5, **options)
        assert isinstance(out, torch.Tensor)
        torch.testing.assert_close(out.double(), ref, rtol=1e-2, atol=1e-3)
    else:
        check(q, k, v, **options)


@pytest.mark.parametrize("scales", DTYPES)
def test_scales_of_other_dtypes_and_strides(scales: torch.dtype) -> None:
    """As a cache has them: views into buffers with room, scales one behind the other in a fourth dimension."""
    q, k, v = case(2, 4, 2, 1, 60, 32, 32, torch.float16, torch.int8)
    buffers = [torch.zeros(2, 2, 96, 32, dtype=torch.int8, device=DEVICE) for _ in "kv"]
    rooms = [torch.full((2, 2, 96, 1), float("nan"), dtype=scales, device=DEVICE) for _ in "kv"]
    for buffer, room, (codes, scale) in zip(buffers, rooms, (k, v), strict=True):
        buffer[:, :, 5:65] = codes
        room[:, :, 5:65, 0] = (scale * 100).to(scales)
    k, v = ((b[:, :, 5:65], r[:, :, 5:65, 0]) for b, r in zip(buffers, rooms, strict=True))
    check(q, k, v)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32])
def test_what_is_large_does_not_overflow(dtype: torch.dtype) -> None:
    """Products are made in fp16, which ends at 65,504; q, scales and values may be larger."""
    q, k, v = case(1, 2, 1, 1, 50, 32, 32, torch.float32, torch.int8)
    factor = 1e4 if dtype == torch.float16 else 1e6
    q, k, v = (q * factor).to(dtype), (k[0], k[1] / factor), (v[0], v[1] * factor)
    out = check(q, k, v)
    assert out.abs().max() > 2


def test_a_token_without_any_content() -> None:
    q, k, v = case(1, 2, 1, 1, 20, 16, 16, torch.float16, torch.int8)
    zero = torch.zeros_like(k[1])
    assert not check(q, (k[0], zero), (v[0], zero)).any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k_scale": None}, "codes need k_scale"),
        ({"v_scale": torch.ones(1, 1, 19)}, r"v_scale \[1, 1, 20\] of fp16, bf16 or fp32, not \[1, 1, 19\]"),
        ({"k": torch.zeros(1, 1, 20, 16)}, "int8 or float8_e4m3fn that lie whole, not for k of torch.float32"),
    ],
)
def test_what_does_not_go_together(change: dict[str, Any], says: str) -> None:
    q, (k, ks), (v, vs) = case(1, 2, 1, 1, 20, 16, 16, torch.float16, torch.int8)
    operands: dict[str, Any] = {"q": q, "k": k, "v": v, "k_scale": ks, "v_scale": vs} | change
    operands = {name: t.to(DEVICE) if t is not None else None for name, t in operands.items()}
    with pytest.raises(ValueError, match=says):
        grouped_decode(**operands, scale=1.0)
    with pytest.raises(ValueError, match="one dtype"):
        grouped_decode(q, k, v, scale=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_become_codes_in_one_launch(kind: str) -> None:
    """As the plain truth makes them, bit by bit."""
    if kind == "fp8" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter rounds to fp8 in a way of its own")
    of = KINDS[kind]
    for dtype in DTYPES:
        k = torch.randn(2, 3, 5, 40, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 4, 5)[:, None]
        v = torch.randn(2, 5, 3, 24, generator=torch.Generator().manual_seed(2)).transpose(1, 2)
        k[0, 0, 0] = 0.0
        k, v = k.to(dtype), v.to(dtype)
        found = packed(k.to(DEVICE), v.to(DEVICE), of.keys.dtype, of.values.dtype)
        for (bits, scales), states, codes in zip(found, (k, v), of[1:], strict=True):
            expected, expected_scales = pack(states, codes)
            assert torch.equal(scales.cpu(), expected_scales)
            assert torch.equal(bits.cpu(), expected)


def test_packing_is_seen_by_those_who_watch_operators() -> None:
    """A recorded step is written down as operators: a kernel beside them would be lost."""
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    k = torch.randn(2, 3, 5, 40, device=DEVICE)
    with Watch():
        found = packed(k, k, torch.int8, torch.int8)
    assert seen == ["hf_attn_patch::pack_codes"]
    for (bits, scales), (expected, expected_scales) in zip(found, packed(k, k, torch.int8, torch.int8), strict=True):
        assert torch.equal(bits, expected)
        assert torch.equal(scales, expected_scales)
