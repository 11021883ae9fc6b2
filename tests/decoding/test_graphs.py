"""Recorded decoding steps where there are no CUDA graphs: a recording is then the work done again, so that all around
it is tested everywhere; and the compiled steps, which are the same code on every device."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from decoding import FAMILIES, batch, build, generate, recorded
from transformers import BertConfig, BertModel, DynamicCache

import hf_attn_patch
from hf_attn_patch.compat.calls import cache_of as cache_of_output
from hf_attn_patch.compat.calls import generate_keyword
from hf_attn_patch.decoding import cuda_graphs as graphs
from hf_attn_patch.decoding import step
from hf_attn_patch.decoding.recorded_forward import state_of
from hf_attn_patch.errors import AttentionError


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_a_dynamic_cache(family: str, padded: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = build(family, "cpu"), batch("cpu", padded=padded)
    expected = generate(model, inputs)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs=True)
    caplog.set_level("INFO", logger="hf_attn_patch")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=60, return_dict_in_generate=True)
    torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
    assert not [message for message in caplog.messages if "decoding steps of" in message]
    assert recorded(model) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_compiled_steps_give_the_same_tokens(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compilations: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(1)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    model, inputs = build(family, "cpu"), batch("cpu")
    expected = generate(model, inputs)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs="compiled")
    caplog.set_level("INFO", logger="hf_attn_patch")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=60, return_dict_in_generate=True)
    torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
    assert not [message for message in caplog.messages if "decoding steps of" in message]
    assert recorded(model) == 1
    assert len(compilations) == 1


def test_buffers_of_any_length_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache grows, and the next call has a longer prompt: nothing is compiled anew."""
    compilations: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(1)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    model, batches = build("llama", "cpu"), [batch("cpu", 3, length) for length in (37, 245, 600)]
    expected = [generate(model, each, max_new_tokens=30) for each in batches]
    hf_attn_patch.enable(model, cuda_graphs="compiled")
    for each, tokens in zip(batches, expected, strict=True):
        torch.testing.assert_close(generate(model, each, max_new_tokens=30), tokens, rtol=0, atol=0)
    assert len(compilations) == 1


def test_a_step_that_cannot_be_compiled_is_recorded_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("not on this machine")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    model, inputs = build("llama", "cpu"), batch("cpu")
    expected = generate(model, inputs)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs="compiled")
    caplog.set_level("INFO", logger="hf_attn_patch")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=60, return_dict_in_generate=True)
    torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
    said = [message for message in caplog.messages if "decoding steps of" in message]
    assert len(said) == 1
    assert "are not compiled" in said[0]
    assert recorded(model) == 1


def test_turned_off_again() -> None:
    model, inputs = build("llama", "cpu"), batch("cpu")
    expected = generate(model, inputs)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs=True)
    hf_attn_patch.enable(model, cuda_graphs=False)
    assert "forward" not in model.__dict__
    torch.testing.assert_close(generate(model, inputs), expected, rtol=0, atol=0)
    assert recorded(model) == 0


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(AttentionError, match="'compile' is not known; choose True, 'compiled', 'unfused' or False"):
        hf_attn_patch.enable(build("llama", "cpu"), cuda_graphs="compile")


def cache_of(model: Any, **kwargs: Any) -> type:
    out = model.generate(**batch("cpu"), do_sample=False, return_dict_in_generate=True, **kwargs)
    return type(cache_of_output(out))


def test_one_line_gives_all_of_it(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = build("llama", "cpu"), batch("cpu")
    expected = generate(model, inputs)
    caplog.set_level("INFO", logger="hf_attn_patch")
    hf_attn_patch.enable(model)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=60, return_dict_in_generate=True)
    torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
    assert type(cache_of_output(out)) is hf_attn_patch.GrowingCache
    assert recorded(model) == 1
    assert "Decoding steps are recorded as CUDA graphs" in str(hf_attn_patch.explain(model))
    assert not [message for message in caplog.messages if "decoding steps of" in message]
    before = dict(vars(model))
    hf_attn_patch.enable(model)
    assert dict(vars(model)) == before


def test_each_is_off_by_name() -> None:
    model = build("llama", "cpu")
    bare = dict(vars(model))
    hf_attn_patch.enable(model, cache=None)
    assert cache_of(model, max_new_tokens=30) is DynamicCache
    assert recorded(model) == 0
    hf_attn_patch.enable(model, cuda_graphs=False)
    assert cache_of(model, max_new_tokens=30) is hf_attn_patch.GrowingCache
    assert recorded(model) == 0
    hf_attn_patch.enable(model, cache=None, cuda_graphs=False)
    assert dict(vars(model)) == bare


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_short_answer_is_not_recorded(tokens: int) -> None:
    model, inputs = build("llama", "cpu"), batch("cpu")
    expected = generate(model, inputs, max_new_tokens=tokens)
    hf_attn_patch.enable(model)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, return_dict_in_generate=True)
    torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
    steps = state_of(model).caches.get(cache_of_output(out))
    assert steps is None or not steps.known


def test_nothing_is_done_where_nothing_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", "cpu")
    bare = dict(vars(model))
    monkeypatch.setattr(graphs, "DEVICES", {"cuda"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hf_attn_patch.enable(model)
    assert dict(vars(model)) == bare
    assert cache_of(model, max_new_tokens=3) is DynamicCache
    assert "Decoding steps" not in str(hf_attn_patch.explain(model, device="cpu"))


@pytest.mark.parametrize("loud", [False, True])
def test_what_cannot_be_recorded_is_said_once(loud: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Quietly where nobody asked by name."""
    model, inputs = build("llama", "cpu"), batch("cpu")
    expected = generate(model, inputs)
    model.model.layers[1].register_forward_hook(lambda *_: None)
    caplog.set_level("INFO", logger="hf_attn_patch")
    how: dict[str, Any] = {"cuda_graphs": True} if loud else {}
    hf_attn_patch.enable(model, **how)
    for _ in range(2):
        torch.testing.assert_close(generate(model, inputs), expected, rtol=0, atol=0)
    said = [(r.levelname, r.message) for r in caplog.records if "decoding steps of" in r.message]
    level = "WARNING" if loud else "INFO"
    why = "it has hooks (model.layers.1)"
    assert said == [(level, f"decoding steps of LlamaForCausalLM are not recorded as CUDA graphs: {why}")]
    assert f"Decoding steps are not recorded as CUDA graphs: {why}." in str(hf_attn_patch.explain(model))


def test_models_that_do_not_generate_are_switched_all_the_same() -> None:
    model = BertModel(BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32))
    bare = {*vars(model)}
    hf_attn_patch.enable(model)
    assert {*vars(model)} == bare
    for explicit in ({"cache": "growing"}, {"cuda_graphs": True}, {"cuda_graphs": "compiled"}):
        with pytest.raises(AttentionError, match="BertModel cannot generate"):
            hf_attn_patch.enable(model, **explicit)


def failing(method: Any, at: int, error: BaseException, behind: bool = False) -> Any:
    """A method that raises at one of its calls: instead of the work, or behind it."""
    calls: list[int] = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) != at:
            return method(*args, **kwargs)
        if behind:
            method(*args, **kwargs)
        raise error

    return fails


def test_an_error_of_the_model_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ordinary step that others are compared with has written to the cache: it is not done again."""
    model, inputs = build("llama", "cpu"), batch("cpu", 2, 9, padded=False)
    hf_attn_patch.enable(model)
    layers = len(model.model.layers)
    mlp = type(model.model.layers[0].mlp)
    monkeypatch.setattr(mlp, "forward", failing(mlp.forward, 3 * layers, torch.OutOfMemoryError("no room")))
    cache = hf_attn_patch.GrowingCache(config=model.config)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        generate(model, inputs, **{generate_keyword(): cache})
    assert [layer.get_seq_length() for layer in cache.layers] == [9 + 2] * layers


@pytest.mark.parametrize("behind", [False, True], ids=["instead", "behind"])
def test_a_loop_goes_on_after_an_interrupt(behind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama", "cpu"), batch("cpu", 2, 14, padded=False)["input_ids"]
    hf_attn_patch.enable(model)
    monkeypatch.setattr(step.Step, "work", failing(step.Step.work, 3, KeyboardInterrupt(), behind))
    cache, interrupted = hf_attn_patch.GrowingCache(config=model.config), 0
    found: list[torch.Tensor] = []
    with torch.no_grad():
        expected = model(ids).logits[:, 4:]
        model(ids[:, :4], use_cache=True, **{generate_keyword(): cache})
        while len(found) < 10:
            token = ids[:, 4 + len(found)][:, None]
            try:
                found.append(model(token, **{generate_keyword(): cache}).logits)
            except KeyboardInterrupt:
                interrupted += 1
    assert interrupted == 1
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(generate_keyword() != "cache", reason="this transformers has one name for a cache")
def test_two_caches_are_left_to_the_model() -> None:
    """As PEFT 0.21 gives them for prefix tuning: transformers takes one, with a warning."""
    model, ids = build("llama", "cpu"), batch("cpu", 2, 9, padded=False)["input_ids"]
    hf_attn_patch.enable(model)
    caches = [hf_attn_patch.GrowingCache(config=model.config) for _ in range(2)]
    with torch.no_grad(), pytest.warns(FutureWarning, match="Both `past_key_values` and `cache` are set"):
        model(ids, cache=caches[0], past_key_values=caches[1])
    assert [cache.get_seq_length() for cache in caches] == [9, 0]
