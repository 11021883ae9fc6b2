"""Decoding steps recorded as CUDA graphs: the same tokens as DynamicCache's, fewer launches, memory that is freed."""

from __future__ import annotations

import copy
import functools
import gc
from typing import Any

import decoding
import pytest
import torch
from decoding import FAMILIES, generate, recorded
from transformers import DynamicCache

import hf_attn_patch
from hf_attn_patch.cache.growing_cache import GrowingCache
from hf_attn_patch.decoding import fusing
from hf_attn_patch.decoding import step as recorded_step
from hf_attn_patch.decoding.tape import Tape

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_step, "FUSED_SHORT", 0)


build = functools.partial(decoding.build, device="cuda")
batch = functools.partial(decoding.batch, "cuda")


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_a_dynamic_cache(family: str, padded: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = build(family), batch(padded=padded)
    expected = generate(model, inputs)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs=True)
    caplog.set_level("INFO", logger="hf_attn_patch")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=60, return_dict_in_generate=True)
    torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
    assert not [r for r in caplog.messages if "not recorded" in r]
    assert recorded(model) == 1
    told = fusing.told[model]
    assert not isinstance(told, str), told
    assert sum(told.values()) >= 2
    hf_attn_patch.enable(model, cuda_graphs=False)
    torch.testing.assert_close(generate(model, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_later_calls_use_the_step_again(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written down once, and recorded at once from the second call on; on other prompts, and other lengths."""
    model = build(family, dtype=dtype)
    hf_attn_patch.enable(model)
    times = []

    def tape() -> Tape:
        times.append(1)
        return Tape()

    monkeypatch.setattr(recorded_step, "Tape", tape)
    hf_attn_patch.enable(other := copy.deepcopy(model), cuda_graphs="unfused")
    found = [generate(model, batch(length=length)) for length in (37, 52, 52)]
    torch.testing.assert_close(found[1], found[2], rtol=0, atol=0)
    if dtype == torch.float32:  # else a kernel may round another way than the operators that it stands for
        torch.testing.assert_close(found[1], generate(other, batch(length=52)), rtol=0, atol=0)
    assert len(times) == 1
    assert not isinstance(fusing.told[model], str)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bart"])
@pytest.mark.parametrize(
    "how",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 2, "do_sample": True}],
    ids=["beams", "sampling", "beams sampled"],
)
def test_other_ways_to_generate(family: str, how: dict[str, Any]) -> None:
    model, inputs = build(family), batch()
    expected = generate(model, inputs, **how)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs=True)
    torch.testing.assert_close(generate(model, inputs, **how), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_capacity_is_outgrown_and_windows_move(family: str) -> None:
    model, inputs = build(family), batch(3, 30)
    expected = generate(model, inputs, max_new_tokens=700)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs=True)
    mine = GrowingCache(config=model.config)
    tokens = generate(model, inputs, max_new_tokens=700, past_key_values=mine)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
    if family == "llama":
        assert mine.capacity() >= 729
        assert recorded(model) == 1  # those for the smaller buffers are gone


def test_generations_in_a_row_and_interleaved_caches() -> None:
    model = build("llama")
    batches = [batch(4), batch(2), batch(1), batch(4, 61), batch(2)]
    expected = [generate(model, b) for b in batches]
    hf_attn_patch.enable(model, cache="growing", cuda_graphs=True)
    for b, tokens in zip(batches, expected, strict=True):
        torch.testing.assert_close(generate(model, b), tokens, rtol=0, atol=0)
    with torch.no_grad():  # two loops of one's own, step by step in turn
        caches = [GrowingCache(config=model.config) for _ in range(2)]
        masks = [b["attention_mask"] for b in batches[:2]]
        found = []
        for b, cache in zip(batches, caches, strict=False):
            positions = (b["attention_mask"].cumsum(1) - 1).clamp(min=0)
            found.append([model(**b, position_ids=positions, past_key_values=cache).logits[:, -1:].argmax(-1)])
        kept = []
        for _ in range(30):
            for i, cache in enumerate(caches):
                masks[i] = torch.nn.functional.pad(masks[i], (0, 1), value=1)
                positions = masks[i].cumsum(1)[:, -1:] - 1
                logits = model(
                    input_ids=found[i][-1], attention_mask=masks[i], position_ids=positions, past_key_values=cache
                ).logits
                kept.append((logits, logits.clone()))
                found[i].append(logits.argmax(-1))
    for i in range(2):
        torch.testing.assert_close(torch.cat(found[i], 1), expected[i][:, 37 : 37 + 31], rtol=0, atol=0)
    for logits, copy_ in kept:  # what was returned is the caller's: later steps do not write to it
        torch.testing.assert_close(logits, copy_, rtol=0, atol=0)
    assert recorded(model) == 2


def test_crop_and_copies_of_the_cache() -> None:
    model, inputs = build("llama"), batch(2, padded=False)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs=True)
    with torch.no_grad():
        cache = GrowingCache(config=model.config)
        first = model(**inputs, past_key_values=cache).logits[:, -1:].argmax(-1)

        def go_on(cache: Any, steps: int) -> torch.Tensor:
            tokens = [first]
            for _ in range(steps):
                tokens.append(model(input_ids=tokens[-1], past_key_values=cache).logits.argmax(-1))
            return torch.cat(tokens, 1)

        expected = go_on(DynamicCache([(layer.keys, layer.values) for layer in cache.layers]), 12)
        torch.testing.assert_close(go_on(cache, 12), expected, rtol=0, atol=0)
        cache.crop(-12)
        torch.testing.assert_close(go_on(cache, 12), expected, rtol=0, atol=0)
        cache.crop(-12)
        twin = copy.deepcopy(cache)
        torch.testing.assert_close(go_on(cache, 12), expected, rtol=0, atol=0)
        torch.testing.assert_close(go_on(twin, 12), expected, rtol=0, atol=0)


def test_the_memory_goes_with_the_cache() -> None:
    model, inputs = build("llama", dtype=torch.bfloat16), batch(4)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs=True)
    generate(model, inputs)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        out = model.generate(**inputs, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
        assert recorded(model) == 1
        cache = out.past_key_values
        reserved = torch.cuda.memory_reserved()
        del out, cache
        assert recorded(model) == 0
    assert torch.cuda.memory_reserved() <= reserved
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 4096


class Waiting(torch.nn.Module):
    """A layer that waits for the device, as some models do."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if float(x.sum().item()) < 1e30 else x


def test_a_model_that_waits_goes_on_as_before(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = build("llama"), batch(3)
    model.model.layers[1].mlp = Waiting(model.model.layers[1].mlp)
    expected = generate(model, inputs, do_sample=True)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs=True)
    caplog.set_level("INFO", logger="hf_attn_patch")
    for _ in range(2):
        torch.testing.assert_close(generate(model, inputs, do_sample=True), expected, rtol=0, atol=0)
    assert len([r for r in caplog.messages if "not recorded" in r and "waits for the device" in r]) == 1


def test_an_error_in_a_recording_leaves_a_sound_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("llama"), batch(3)
    expected = generate(model, inputs, do_sample=True)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs=True)
    plain = recorded_step.Step.work

    def work(self: Any, cache: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            torch.ones(1, device="cuda").item()
        return plain(self, cache)

    monkeypatch.setattr(recorded_step.Step, "work", work)
    for _ in range(2):
        torch.testing.assert_close(generate(model, inputs, do_sample=True), expected, rtol=0, atol=0)
    monkeypatch.undo()
    other = build("llama")
    hf_attn_patch.enable(other, cache="growing", cuda_graphs=True)
    torch.testing.assert_close(generate(other, inputs, do_sample=True), expected, rtol=0, atol=0)


def test_a_step_is_one_launch() -> None:
    model, inputs = build("llama", dtype=torch.bfloat16), batch(4)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs=True)
    with torch.no_grad():
        cache = GrowingCache(config=model.config)
        token = model(**inputs, past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(4):
            model(input_ids=token, past_key_values=cache)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(input_ids=token, past_key_values=cache)
        assert sum("mm" in event.name for event in profile.events()) == 0  # the host starts no matmul of the model's


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_compiled_steps_give_the_same_tokens(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = build(family), batch()
    expected = generate(model, inputs)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs="compiled")
    caplog.set_level("INFO", logger="hf_attn_patch")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=60, return_dict_in_generate=True)
    torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
    assert not [message for message in caplog.messages if "decoding steps of" in message]
    assert recorded(model) == 1
