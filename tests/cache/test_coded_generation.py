"""generate() with a cache of codes: the tokens of a plain cache that the test itself rounds, and half the memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from decoding import FAMILIES, SIZES, batch, build, recorded
from rounded import RoundedCache, rounded
from transformers import DynamicCache, EncoderDecoderCache, FalconH1Config, LlamaConfig, LlamaForCausalLM

from hf_attn_patch import AttentionError, GrowingCache, enable, explain
from hf_attn_patch.attn.codes import E4M3, INT8, KINDS, Codes, pack, unpack
from hf_attn_patch.attn.shared import Parted
from hf_attn_patch.cache import beforehand, beginnings
from hf_attn_patch.cache.coded_layers import CodedLayer, CodedSlidingWindowLayer
from hf_attn_patch.cache.growing_cache import use_growing_cache
from hf_attn_patch.cache.shared_prefix import SharedLayer
from hf_attn_patch.compat.calls import cache_of as cache_of_output
from hf_attn_patch.compat.calls import generate_keyword
from hf_attn_patch.decoding import cuda_graphs as graphs

CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled answers": {"do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(autouse=True)
def _share_short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginnings, "SHARE_FROM", 1)
    monkeypatch.setattr(beforehand, "DEVICES", {"cpu"})
    monkeypatch.setattr(beforehand, "WORTH", 0)


def tokens(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(1)
    options = {"do_sample": False, "max_new_tokens": 16, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, **options)


def with_rounded(model: Any, inputs: dict[str, Any], kind: str, **options: Any) -> torch.Tensor:
    """The tokens by transformers' own attention and a cache that the test rounds."""
    model.set_attn_implementation("eager")
    cache: Any = RoundedCache(kind, model.config.get_text_config(decoder=True))
    if model.config.is_encoder_decoder:
        cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))
    sequences: torch.Tensor = tokens(model, inputs, **{generate_keyword(): cache}, **options).sequences
    return sequences


def cache_of(out: Any) -> Any:
    cache = cache_of_output(out)
    return getattr(cache, "self_attention_cache", cache)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("call", CALLS)
def test_tokens_are_those_of_a_rounded_cache(family: str, call: str, kind: str) -> None:
    options, model = CALLS[call], build(family, "cpu")
    inputs = batch("cpu", 1 if call == "prompt lookup" else 3, 60 if family == "llama" else 37)
    if call == "chunked prefill" and family == "bart":
        pytest.skip("transformers does not read an encoder's prompt in chunks")
    expected = with_rounded(model, inputs, kind, **options)
    enable(model, cache=kind)
    out = tokens(model, inputs, **options)
    assert torch.equal(out.sequences, expected)
    layers = cache_of(out).layers
    assert all(isinstance(layer, CodedLayer) for layer in layers)
    assert sum(isinstance(layer, CodedSlidingWindowLayer) for layer in layers) == {
        "gemma2": 2, "gemma3": 2, "mistral": 4,
    }.get(family, 0)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "bart"])
@pytest.mark.parametrize("answers", [1, 3])
def test_recorded_steps(
    family: str, answers: int, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    model, inputs = build(family, "cpu"), batch("cpu", 3)
    options: dict[str, Any] = {"max_new_tokens": 40}
    if answers > 1:
        options |= {"num_return_sequences": answers, "do_sample": True}
    expected = with_rounded(model, inputs, kind, **options)
    enable(model, cache=kind, cuda_graphs=True)
    caplog.set_level("INFO", logger="hf_attn_patch")
    out = tokens(model, inputs, **options)
    assert torch.equal(out.sequences, expected)
    assert not [message for message in caplog.messages if "decoding steps of" in message]
    assert recorded(model) == 1
    shared = [layer for layer in cache_of(out).layers if type(layer.codes) is SharedLayer]
    assert bool(shared) == (answers > 1 and family != "bart")


def test_steps_of_codes_are_not_compiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    model, inputs = build("llama", "cpu"), batch("cpu", 2)
    expected = with_rounded(model, inputs, "int8", max_new_tokens=30)
    enable(model, cache="int8", cuda_graphs="compiled")
    out = tokens(model, inputs, max_new_tokens=30)
    assert torch.equal(out.sequences, expected)
    assert [m for m in caplog.messages if "not compiled: its cache holds codes, which are read as they are" in m]
    assert recorded(model) == 1


def tensors_of(layer: Any) -> list[torch.Tensor]:
    return [t for part in (layer.codes, layer.scales) for t in (part.keys, part.values)]


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_half(kind: str) -> None:
    """A byte for each number, and four for each head and token: 0.53 of bf16 at a head dimension of 64."""
    config = LlamaConfig(**SIZES | {"hidden_size": 512, "num_hidden_layers": 2})
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    enable(model, cache=kind)
    cache = cache_of(tokens(model, batch("cpu", 3, 60), max_new_tokens=20))
    cache.trim()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for x in cache.layers for t in tensors_of(x)}
    numbers = 2 * 2 * 3 * 2 * (60 + 19)  # K and V, layers, rows, KV heads, tokens
    assert sum(held.values()) == numbers * (64 + 4)
    bf16 = numbers * 64 * 2
    assert sum(held.values()) / bf16 == pytest.approx(0.53, abs=0.002)
    assert type(cache.layers[0].codes.keys) is torch.Tensor
    assert cache.layers[0].codes.keys.dtype == torch.int8


@pytest.mark.parametrize("codes", [INT8, E4M3])
def test_what_is_lost(codes: Codes) -> None:
    """At most half a step: of int8 a step is 1/127 of the largest component; of e4m3 2**-3 of a number's own power of
    two, at least 2**-9 (of 448)."""
    states = torch.randn(3, 2, 50, 64) * torch.logspace(-3, 3, 50)[:, None]
    most = states.abs().amax(-1, keepdim=True)
    back = unpack(*pack(states, codes), codes, torch.float32)
    if codes == INT8:
        allowed = most / 127 / 2
    else:
        unit = most / 448
        step = torch.exp2(torch.floor(torch.log2(states.abs() / unit)) - 3).clamp(min=2.0**-9)
        allowed = step * unit / 2
    assert ((back - states).abs() <= allowed * (1 + 1e-4)).all()
    assert torch.equal(back.abs().amax(-1), pack(states, codes)[1][..., 0] * codes.largest)


@pytest.mark.parametrize("codes", [INT8, E4M3])
def test_what_is_not_finite_stays_so(codes: Codes) -> None:
    states = torch.ones(4, 8)
    states[0, 3], states[1, 2], states[2] = math.inf, math.nan, 0.0
    back = unpack(*pack(states, codes), codes, torch.float32)
    assert not back[:2].isfinite().any()
    assert torch.equal(back[2:], states[2:])


def test_a_cache_that_is_passed_and_one_that_is_shared() -> None:
    """A prefix of codes, and two calls that go on from it."""
    model = build("llama", "cpu")
    ids = torch.randint(2, 128, (1, 30), generator=torch.Generator().manual_seed(5))
    keyword = generate_keyword()

    def ahead(cache: Any) -> Any:
        with torch.no_grad():
            model(ids[:, :20], **{keyword: cache})
        return cache

    model.set_attn_implementation("eager")
    expected = tokens(model, {"input_ids": ids}, **{keyword: ahead(RoundedCache("fp8", model.config))}).sequences
    enable(model, cache=None, cuda_graphs=False)
    prefix = ahead(GrowingCache(config=model.config, dtype="fp8"))
    for _ in range(2):
        out = tokens(model, {"input_ids": ids}, **{keyword: prefix.share()})
        assert torch.equal(out.sequences, expected)
    assert prefix.get_seq_length() == 20


def test_numbers_are_made_only_where_something_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step makes each layer's keys and values once, and what lies in the cache stays codes."""
    made: list[int] = []
    make = Parted.make

    def counted(self: Parted, which: int) -> torch.Tensor:
        made.append(which)
        return make(self, which)

    monkeypatch.setattr(Parted, "make", counted)
    model = build("llama", "cpu")
    enable(model, cache="int8")
    tokens(model, batch("cpu", 2), max_new_tokens=5)  # four steps after the prompt
    assert sorted(made) == [0] * 16 + [1] * 16


def test_it_says_that_it_is_not_exact() -> None:
    assert "dtype='fp8', which is not exact" in repr(GrowingCache(dtype="fp8"))
    assert "exact" not in repr(GrowingCache())
    model = build("llama", "cpu")
    assert "not exact" not in str(explain(model, device="cpu"))
    enable(model, cache="int8")
    assert "generate caches keys and values as int8 codes: not exact" in str(explain(model, device="cpu"))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no codes 'int4' for keys and values; choose 'int8' or 'fp8'"):
        GrowingCache(dtype="int4")
    with pytest.raises(ValueError, match="no codes 'int4'"):
        use_growing_cache(build("llama", "cpu"), dtype="int4")
    with pytest.raises(AttentionError, match="no cache 'int4'; choose 'growing', 'int8' or 'fp8'"):
        enable(build("llama", "cpu"), cache="int4")
    config = FalconH1Config(**SIZES)
    with pytest.raises(TypeError, match="holds more than keys and values, and is not kept as int8 codes"):
        GrowingCache(config=config, dtype="int8")
    key = torch.randn(1, 2, 3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="a cache of int8 codes passes no gradients on"):
        GrowingCache(dtype="int8").update(key, key, 0)


def test_states_that_were_there_before_become_codes() -> None:
    before = DynamicCache()
    k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    before.update(k, v, 0)
    cache = GrowingCache.from_dynamic(before, dtype="int8")
    torch.testing.assert_close(cache.layers[0].keys, rounded(k, "int8"))
    torch.testing.assert_close(cache.layers[0].values, rounded(v, "int8"))


def test_windows_that_record_their_past_go_on_recording() -> None:
    """As those of an assistant, whose tokens are taken back."""
    before = DynamicCache(config=FAMILIES["mistral"]().config)  # windows of 48
    before.activate_past_recording()
    cache = GrowingCache.from_dynamic(before, dtype="int8")
    k, v = torch.randn(1, 2, 60, 8), torch.randn(1, 2, 60, 8)
    with torch.no_grad():
        cache.layers[0].update(k, v)
        cache.layers[0].crop(-20)
    assert cache.layers[0].get_seq_length() == 40
    torch.testing.assert_close(cache.layers[0].keys, rounded(k[:, :, :40], "int8"))


def test_offloaded_codes_travel_as_codes() -> None:
    layer = GrowingCache(dtype="int8").layer_class_to_replicate()
    layer.update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
    layer.offload()
    assert all(t.device.type == "cpu" for t in tensors_of(layer))
    assert [t.dtype for t in tensors_of(layer)] == [torch.int8] * 2 + [torch.float32] * 2
    layer.prefetch()
    keys, _ = layer.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
    assert keys.shape == (1, 2, 4, 8)
