"""Who runs what on devices that are not here: requests of every compute capability, of AMD's GPUs, MPS and XPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_patch.attn import devices, plan
from hf_attn_patch.attn.backends import (
    _flex_tiles,
    _sdpa_members,
    flash2,
    flash3,
    flash4,
    flex,
    torch_sdpa,
    triton_decode,
)
from hf_attn_patch.attn.backends.registry import BACKENDS
from hf_attn_patch.attn.backends.registry import backend as backend_named
from hf_attn_patch.attn.devices import Device, device_of
from hf_attn_patch.attn.kernels.decode_plan import block_rows, choose
from hf_attn_patch.attn.plan import reasons
from hf_attn_patch.attn.request import AttentionRequest, Operands, kind_of, request_of
from hf_attn_patch.attn.visibility import DENSE, FULL, PADDED, Dense, Padded, Visibility, full, packed

CAPABILITIES = (70, 72, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
HALF = (torch.float16, torch.bfloat16)


def request(capability: int = 0, *, device: str = "cuda", decode: bool = False, **facts: Any) -> AttentionRequest:
    """8192 tokens of prefill, or one of decoding, 32 query and 8 KV heads of 128 unless told otherwise."""
    plain = AttentionRequest(
        device=device, capability=capability, dtype=torch.float16, heads=32, kv_heads=8, head_dim=128, value_dim=128,
        q_class=1 if decode else 17, work_bits=40, streams=8, rows=4 if decode else 0, square=not decode,
        visibility=FULL, causal=not decode, windowed=False, softcap=False, sinks=False, bias=False, bias_grad=False,
        dropout=False, grad=False, weights=False, per_head_mask=False, deterministic=False, tracing=False,
    )  # fmt: skip
    return plain._replace(**facts)


@pytest.fixture(autouse=True)
def everything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for module in (flash2, flash3, flash4):
        monkeypatch.setattr(module, "absent", lambda: None)


def ladder(asked: AttentionRequest) -> list[str]:
    return [name for name, reason in reasons(asked) if reason is None]


#: backend -> (the least capability, the first that it does not take), in half precision
RANGES = {
    "flash4": (90, 120),
    "flash3": (90, 100),
    "flash2": (80, 1000),
    "torch_varlen": (80, 1000),
    "flex": (75, 1000),
    "torch_sdpa": (70, 1000),
    "triton_decode": (70, 1000),
    "triton_bias": (80, 1000),
    "reference": (0, 1000),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_backend_says_what_it_refuses(capability: int, backend: str) -> None:
    least, below = RANGES[backend]
    asked = request(capability, decode=backend == "triton_decode", bias=backend == "triton_bias")
    reason = backend_named(backend).refuses(asked)
    assert (reason is None) == (least <= capability < below)
    if reason is not None:
        assert f"{capability / 10:.1f}" in reason and devices.generation(capability) in reason


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_bf16_begins_with_ampere(capability: int) -> None:
    for decode in (False, True):
        found = ladder(request(capability, decode=decode, dtype=torch.bfloat16))
        assert (found == ["reference"]) == (capability < 80)
        if capability < 80:
            refused = dict(reasons(request(capability, decode=decode, dtype=torch.bfloat16)))
            assert "use float16" in str(refused["torch_sdpa"])


def test_bf16_before_ampere_is_told_once_a_kind(caplog: pytest.LogCaptureFixture) -> None:
    plan.forget()
    for asked in (request(75, dtype=torch.bfloat16), request(80, dtype=torch.bfloat16), request(75)):
        for _ in range(2):
            plan.choose(asked)
    plan.choose(request(75, dtype=torch.bfloat16), "reference")  # asked for by name: no surprise
    plan.forget()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1 and "'reference'" in told[0] and "not 7.5; use float16" in told[0]


@pytest.mark.parametrize(
    ("capability", "prefill", "padded", "decoding"),
    [
        (70, "torch_sdpa", "torch_sdpa", "triton_decode"),
        (75, "torch_sdpa", "torch_sdpa", "triton_decode"),
        (80, "torch_sdpa", "flash2", "triton_decode"),
        (89, "torch_sdpa", "flash2", "triton_decode"),
        (90, "flash4", "flash4", "triton_decode"),
        (100, "flash4", "flash4", "triton_decode"),
        (120, "torch_sdpa", "flash2", "triton_decode"),
    ],
)
def test_the_ladder_of_each_generation(capability: int, prefill: str, padded: str, decoding: str) -> None:
    assert ladder(request(capability))[0] == prefill
    assert ladder(request(capability, visibility=PADDED))[0] == padded
    assert ladder(request(capability, decode=True))[0] == decoding


@pytest.mark.parametrize(("capability", "narrow", "wide"), [
    (75, "torch_sdpa", "torch_sdpa"),
    (80, "triton_bias", "flex"), (90, "triton_bias", "flex"), (120, "triton_bias", "flex"),
])  # fmt: skip
def test_the_ladder_of_training_with_a_bias(capability: int, narrow: str, wide: str) -> None:
    """T5's and ALiBi's; what flex refuses of wide heads is still not summed in memory of B x H x Sq x Sk."""
    asked = request(capability, bias=True, grad=True, bias_grad=True)
    of_64 = asked._replace(head_dim=64, value_dim=64)
    chosen = [next(name for name, refused in reasons(r) if refused is None) for r in (of_64, asked)]
    assert chosen == [narrow, wide]
    if capability >= 80:
        settled = asked._replace(deterministic=True)
        assert next(name for name, refused in reasons(settled) if refused is None) == "triton_bias"
    wide_type = asked._replace(dtype=torch.float32, head_dim=64, value_dim=64)
    assert next(name for name, refused in reasons(wide_type) if refused is None) != "triton_bias"


def test_before_ampere_nothing_runs_without_tensor_cores_that_can_have_them() -> None:
    """Triton multiplies without them there; flex is for what torch's kernel refuses."""
    for facts in ({"visibility": DENSE}, {"windowed": True}, {"bias": True}, {"tree": True, "visibility": DENSE}):
        for grad in (False, True):
            assert ladder(request(75, grad=grad, **facts))[0] == "torch_sdpa"
    assert ladder(request(75, softcap=True))[0] == "flex"
    assert ladder(request(70, softcap=True)) == ["reference"]


#: (from Ampere on, queries a tile, keys, stages, warps, the larger head dimension to a power of two, a number for each
#: score is read) -> bytes, as Triton 3.7 compiled flex_attention's loads and products for 7.5, 8.6 and 8.9
FLEX_FORWARD: dict[tuple[int, ...], int] = {
    (False, 64, 32, 1, 4, 128, False): 49152, (False, 64, 32, 1, 4, 128, True): 49152,
    (False, 32, 16, 1, 4, 256, False): 49152, (False, 32, 16, 1, 4, 256, True): 49152,
    (False, 64, 64, 3, 4, 64, False): 32768, (False, 64, 64, 3, 4, 64, True): 32768,
    (True, 128, 64, 3, 4, 64, False): 49152, (True, 64, 64, 2, 4, 64, True): 40960,
    (True, 128, 64, 3, 8, 128, False): 98304, (True, 64, 64, 2, 4, 128, True): 73728,
    (True, 32, 64, 2, 4, 256, False): 86016, (True, 32, 64, 2, 4, 256, True): 94208,
    (True, 32, 64, 3, 4, 256, False): 151552,
}  # fmt: skip
#: (from Ampere on, tiles, stages, larger head dimension) -> bytes
FLEX_BACKWARD: dict[tuple[int, ...], int] = {
    (False, 16, 1, 128): 24576, (False, 16, 1, 256): 49152,
    (True, 64, 2, 128): 68096, (True, 64, 3, 128): 84992, (True, 64, 2, 256): 135680, (True, 32, 1, 256): 65536,
}  # fmt: skip


@given(
    capability=st.sampled_from([c for c in CAPABILITIES if c >= 75]),
    D=st.sampled_from([64, 72, 96, 128, 160, 192, 256]),
    Dv=st.sampled_from([64, 72, 96, 128, 160, 192, 256]),
    scored=st.booleans(),
)
def test_tiles_of_flex_fit_into_shared_memory(capability: int, D: int, Dv: int, scored: bool) -> None:
    """Torch gives A10, L4, RTX 3090 and 4090 the tiles of an A100 ("no valid triton configs"), and a T4 some of its own
    that do not fit either."""
    early, kib = capability < 80, {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 120: 99, 121: 99}.get(capability, 227)
    options = _flex_tiles.tiles(capability, D, Dv, scored)
    if kib == 227:
        assert not options
        return
    width = next(n for n in (64, 128, 256) if max(D, Dv) <= n)
    # where torch's own are left, they are those of its tables
    own = {64: (64 if early else 128, 64, 3, 4), 128: (128, 64, 3, 8), 256: (32, 64, 3, 4)}[width]
    forward = tuple(v for k, v in options.items() if k.startswith("fwd_")) or own
    if kib == 163 and width <= 128:  # with room for a bias in fp32 of 128 x 64, three times
        assert not options
    else:
        kind = (not early, *forward, width, scored)
        assert FLEX_FORWARD[kind] + 1024 <= kib * 1024
    M1, N1, M2, N2, stages, _ = tuple(v for k, v in options.items() if k.startswith("bwd_")) or (
        (16, 16, 16, 16, 1, 4) if early else (64, 64, 64, 64, 2 + (width == 128), 4)
    )
    if width == 64:  # torch's, which take less than those for 128
        assert (M1, stages) in ((16, 1), (64, 2))
        return
    assert len({M1, N1, M2, N2}) == 1
    fetched = M1 * N1 * 2 * (stages - 1) * scored
    assert FLEX_BACKWARD[not early, M1, stages, width] + fetched + 1024 <= kib * 1024


def test_flex_is_told_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def compiled(q: Any, k: Any, v: Any, kernel_options: Any, **_: Any) -> Any:
        told.append(kernel_options)
        return q, q[..., 0]

    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    q, layout = torch.randn(1, 4, 200, 256, dtype=torch.float16), full(200, 200, False, (None, None), 1)
    asked = request_of(kind_of(q, q, q, None, None, None, 0.0, False, False, None, layout.facts))
    for capability in (90, 89):
        flex.run(q, q, q, asked._replace(device="cuda", capability=capability), Operands(layout, 0.25))
    assert told == [None, _flex_tiles.tiles(89, 256, 256, False)]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_which_of_torchs_kernels(capability: int) -> None:
    wanted = "efficient" if capability < 80 else "cudnn" if 90 <= capability < 120 else "flash"
    assert torch_sdpa.kernel(request(capability)) == wanted
    assert torch_sdpa.kernel(request(capability, dtype=torch.float32)) == "efficient"
    assert torch_sdpa.kernel(request(capability, head_dim=256, value_dim=256)) == (
        "efficient" if capability < 80 else "flash"
    )
    masked = request(capability, visibility=DENSE, grad=True)
    assert torch_sdpa.kernel(masked) == "efficient"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("head_dim", "dropout", "small_cards"),
    [(192, True, True), (224, False, False), (256, False, True), (256, True, False)],
)
def test_wide_heads_in_training_where_shared_memory_is_short(
    capability: int, head_dim: int, dropout: bool, small_cards: bool
) -> None:
    asked = request(capability, head_dim=head_dim, value_dim=head_dim, grad=True, dropout=dropout)
    short = capability in (86, 87, 89, 120, 121)
    takes = capability >= 80 and (small_cards or not short)
    assert (flash2.refuses(asked) is None) == takes
    assert (backend_named("torch_varlen").refuses(asked) is None) == takes
    assert torch_sdpa.kernel(asked) == ("flash" if takes else "efficient")
    assert flash2.refuses(asked._replace(grad=False)) is None or capability < 80


def test_an_amd_gpu_is_none_of_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_known", {})
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    assert device_of(torch.device("cuda", 0)) == Device("hip", 0)
    for decode in (False, True):
        for dtype in (*HALF, torch.float32):
            refused = dict(reasons(request(device="hip", decode=decode, dtype=dtype)))
            for name in ("flash4", "flash3", "flash2", "torch_varlen", "triton_decode"):
                assert refused[name] is not None
            assert refused["torch_sdpa"] is None
    assert torch_sdpa.kernel(request(device="hip")) == "public"
    assert ladder(request(device="hip", softcap=True))[0] == "flex"


def test_nvidias_capability_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(devices, "_known", {})
    monkeypatch.setattr(torch.version, "hip", None)

    def capability(device: Any = None) -> tuple[int, int]:
        asked.append(device)
        return 7, 5

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    assert [device_of(torch.device("cuda", 1)) for _ in range(2)] == [Device("cuda", 75)] * 2
    assert asked == [torch.device("cuda", 1)]
    assert device_of(torch.device("mps")) == Device("mps", 0)


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
def test_other_devices_take_torchs_function(device: str) -> None:
    for facts in (
        {},
        {"decode": True},
        {"visibility": PADDED},
        {"visibility": "packed"},
        {"grad": True},
        {"bias": True},
    ):
        assert ladder(request(device=device, **facts))[0] == "torch_sdpa"
    for facts in (
        {"softcap": True},
        {"sinks": True},
        {"weights": True},
        {"bias": True, "bias_grad": True, "grad": True},
    ):
        assert ladder(request(device=device, **facts)) == ["reference"]


def truth(q: Any, k: Any, v: Any, mask: Any, bias: Any, scale: float) -> torch.Tensor:
    """Plain attention in float64 on repeated KV heads; rows that see nothing are zero."""
    G = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(G, 1).double().nan_to_num() for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num() @ v


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_torchs_function_by_the_group_is_exact(data: st.DataObject) -> None:
    """The way of MPS and the others, on tensors of the CPU, where every kernel of torch's can be had."""
    B, HKV, G = (data.draw(st.sampled_from(n)) for n in ((1, 3), (1, 2), (1, 3)))
    Sq, extra, D, Dv = (data.draw(st.sampled_from(n)) for n in ((1, 2, 17), (0, 5), (8, 12), (8, 20)))
    kind = data.draw(st.sampled_from(["full", "causal", "window", "padded", "mask", "per head", "bias", "packed"]))
    grad = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    HQ, Sk = HKV * G, Sq + extra
    if kind == "packed":
        B, extra, Sk = 1, 0, Sq
    q, k = torch.randn(B, HQ, Sq, D), torch.randn(B, HKV, Sk, D)
    v, bias = torch.randn(B, HKV, Sk, Dv), None
    layout: Visibility = full(Sq, Sk, False, (None, None), B)
    if kind == "causal":
        layout = full(Sq, Sk, True, (None, None), B)
    elif kind == "window":
        layout = full(Sq, Sk, True, (3, None), B)
    elif kind == "padded":
        first = torch.randint(0, Sk, (B,), dtype=torch.int32)
        layout = Padded(B, Sq, Sk, first=first, length=(Sk - first) // 2, stop=Sk)
        k[0, :, : first[0]] = v[0, :, : first[0]] = torch.nan
    elif kind in ("mask", "per head"):
        mask = torch.rand(B, HQ if kind == "per head" else 1, Sq, Sk) < 0.6
        layout = Dense(B, Sq, Sk, mask=mask)
    elif kind == "bias":
        bias = torch.randn(1, HQ, Sq, Sk)
    elif kind == "packed":
        borders = torch.tensor([0, Sq // 2, Sq])
        layout = packed(1, Sq, Sk, borders, borders, Sq, Sk, True)
    given = kind_of(q, k, v, None, None, bias, 0.0, False, False, None, layout.facts)
    asked = request_of(given._replace(grad=grad))._replace(device="mps")
    assert torch_sdpa.refuses(asked) is None and torch_sdpa.kernel(asked) == "public"
    inputs = [t.requires_grad_(grad) for t in (q, k, v)]
    out, _ = torch_sdpa.run(inputs[0], inputs[1], inputs[2], asked, Operands(layout, 0.3, bias=bias))
    seen = replace(layout).dense(q.device)  # one that has worked out nothing yet
    if layout.start:
        seen = torch.ones(1, 1, Sq, layout.keys, dtype=torch.bool) if seen is None else seen
        seen = torch.nn.functional.pad(seen, (layout.start, 0), value=False)
    want = truth(q, k, v, seen, bias, 0.3)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=2e-5)
    if grad:
        loss = torch.randn_like(out)
        found = torch.autograd.grad((out * loss).sum(), inputs)
        wanted = torch.autograd.grad((want * loss).sum(), inputs)
        for f, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(f, w.nan_to_num(), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("Sq", [1, 7])
def test_keys_and_values_are_not_copied_for_the_group(Sq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given_keys: list[torch.Tensor] = []

    def spy(q: Any, k: Any, v: Any, *rest: Any, enable_gqa: bool = False, **options: Any) -> torch.Tensor:
        given_keys.append(k)
        assert not enable_gqa and q.shape[1] == k.shape[1] == 2
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, *rest, **options)

    monkeypatch.setattr(_sdpa_members, "own_attention", spy)
    q, k, v = torch.randn(2, 8, Sq, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    layout = full(Sq, 9, False, (None, None), 2)
    asked = request_of(kind_of(q, k, v, None, None, None, 0.0, False, False, None, layout.facts))
    asked = asked._replace(device="xpu")
    torch_sdpa.run(q, k, v, asked, Operands(layout, 0.25))
    assert len(given_keys) == (1 if Sq == 1 else 4)
    assert {t.untyped_storage().data_ptr() for t in given_keys} == {k.untyped_storage().data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("D", "Dv", "offset"), [(59, 59, 0), (10, 16, 0), (16, 6, 0), (16, 16, 1), (16, 16, 0)])
def test_rows_of_the_memory_efficient_kernel_begin_at_16_bytes(
    D: int, Dv: int, offset: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Ampere on torch has no kernel for others ("no kernel found to launch"); its public function does without."""

    def kernel(
        q: Any, k: Any, v: Any, scores: Any, save: bool, dropout: float, causal: bool, scale: float
    ) -> tuple[torch.Tensor, None]:
        for t in (q, k, v, scores):
            assert t.data_ptr() % 16 == 0 and all(stride * t.itemsize % 16 == 0 for stride in t.stride()[:-1])
        q, k, v, scores = (t.float() for t in (q, k, v, scores))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scores, scale=scale).to(dtype), None

    monkeypatch.setattr(_sdpa_members, "efficient_attention_op", kernel)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, H, S, n + offset, dtype=dtype)[..., offset:].requires_grad_()
        for H, S, n in ((4, 5, D), (2, 7, D), (2, 7, Dv))
    )
    mask = torch.rand(2, 4, 5, 7) < 0.6
    layout = Dense(2, 5, 7, mask=mask)
    asked = request_of(kind_of(q, k, v, None, None, None, 0.0, False, False, None, layout.facts))
    asked = asked._replace(device="cuda", capability=80)
    assert torch_sdpa.kernel(asked) == "efficient"
    out, _ = torch_sdpa.run(q, k, v, asked, Operands(layout, 0.3))
    want = truth(q, k, v, mask, None, 0.3)
    atol = 2e-3 if dtype == torch.float16 else 2e-5
    torch.testing.assert_close(out.double(), want, atol=atol, rtol=atol)
    aim = torch.randn_like(want)
    found = torch.autograd.grad((out * aim).sum(), (q, k, v))
    for f, w in zip(found, torch.autograd.grad((want * aim).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(f, w, atol=10 * atol, rtol=10 * atol)


@given(
    D=st.sampled_from([8, 64, 128, 256, 512]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    heads=st.sampled_from([1, 8, 40, 2560]),
    span=st.sampled_from([1, 700, 8192, 131072]),
    varlen=st.booleans(),
    capability=st.sampled_from(CAPABILITIES),
)
def test_a_tile_of_the_decode_kernel_fits_into_shared_memory(
    D: int, dtype: torch.dtype, heads: int, span: int, varlen: bool, capability: int
) -> None:
    asked = request(capability, decode=True, dtype=dtype, head_dim=D, value_dim=D)
    kib = {70: 96, 72: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 120: 99, 121: 99}.get(capability, 227)
    if triton_decode.refuses(asked) is None:
        tuning = choose(dtype, D, D, heads, span, 40, varlen, devices.tile_room(capability))
        tile = tuning.block_n * 2 * D * dtype.itemsize
        assert tile * (1 if capability < 80 else 2) + 8192 <= kib * 1024  # as Triton's compiler counts it
    else:
        assert (D, dtype) == (512, torch.float32) and kib < 163


@pytest.mark.parametrize(
    ("capability", "dtype", "D", "rows", "compiled"),
    [  # the rows of a tile that fits, and bytes as Triton 3.7 compiled it
        (75, torch.float16, 128, 64, (64, 65536)), (75, torch.float16, 256, 64, (32, 65536)),
        (75, torch.float16, 512, 64, (16, 65536)), (75, torch.float16, 512, 8, (16, 65536)),
        (89, torch.float16, 128, 64, (64, None)), (89, torch.float16, 512, 32, (32, 99328)),
        (89, torch.float16, 512, 64, (32, 99328)), (89, torch.float16, 512, 4, (16, 82432)),
        (89, torch.float16, 256, 64, (32, None)), (89, torch.int8, 256, 64, (64, 86016)),
        (80, torch.float16, 512, 64, (64, 133120)), (90, torch.float16, 256, 64, (64, 102400)),
    ],
)  # fmt: skip
def test_queries_of_the_decode_kernel_fit_beside_its_keys(
    capability: int, dtype: torch.dtype, D: int, rows: int, compiled: tuple[int, int | None]
) -> None:
    room = devices.tile_room(capability)
    block_n = choose(dtype, D, D, 96, 8192, 132, False, room, rows).block_n
    found, taken = compiled
    assert block_rows(rows, 2, dtype, D, D, block_n, capability) == found
    assert taken is None or taken <= devices.shared_memory(capability)
