"""A cache by either of transformers' names for it, by keyword or by position: the same everywhere in this package."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import decoding
import padded
import pytest
import torch
from transformers import BartForConditionalGeneration, DynamicCache, EncoderDecoderCache, StaticCache

import hf_attn_patch
from hf_attn_patch import GrowingCache, unpadded
from hf_attn_patch.compat.calls import Arguments, cache_of, generate_keyword
from hf_attn_patch.decoding import cuda_graphs as graphs

WAYS = ["cache", "past_key_values", "by position"]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def call(model: Any, way: str, cache: Any, **kwargs: Any) -> Any:
    """The model's forward, given ``cache`` in one of :data:`WAYS`."""
    if way != "by position":
        return model(**kwargs, **{way: cache})
    own = next(name for name in WAYS if name in (names := list(inspect.signature(model.forward).parameters)))
    before = [kwargs.pop(name, None) for name in names[: names.index(own)]]
    return model(*before, cache, **kwargs)


def test_arguments_are_named_as_the_forward_names_them() -> None:
    class Old(torch.nn.Module):
        def forward(self, input_ids: Any, past_key_values: Any = None, *, labels: Any = None, **rest: Any) -> None: ...

    class New(torch.nn.Module):
        def forward(self, input_ids: Any, cache: Any = None) -> None: ...

    class None_(torch.nn.Module):  # noqa: N801
        def forward(self, input_ids: Any, **rest: Any) -> None: ...

    old, new, none = (Arguments(kind()) for kind in (Old, New, None_))
    cache = DynamicCache()
    assert (old.cache, new.cache, none.cache) == ("past_key_values", "cache", "")
    assert (old.names, old.rest, new.rest) == (("input_ids", "past_key_values", "labels"), "rest", "")
    for arguments, own in ((old, "past_key_values"), (new, "cache")):
        for args, kwargs in (
            ((1, cache), {}),
            ((1,), {"cache": cache}),
            ((), {"past_key_values": cache, "input_ids": 1}),
        ):
            assert arguments.by_name(args, kwargs) == {"input_ids": 1, own: cache}
        assert arguments.by_name((1,), {"cache": cache, "past_key_values": None}) == {"input_ids": 1, own: cache}
    assert none.by_name((1,), {"cache": cache}) == {"input_ids": 1, "cache": cache}
    with pytest.raises(TypeError, match="two different caches were given, as cache and as past_key_values"):
        old.by_name((1,), {"cache": cache, "past_key_values": DynamicCache()})
    wrong: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((1, cache, 2), {}), ((1,), {"input_ids": 1})]
    for args, kwargs in wrong:
        with pytest.raises(TypeError, match="positional arguments"):
            new.by_name(args, kwargs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_recorded_steps(family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    model, ids = decoding.build(family, "cpu"), decoding.batch("cpu", rows=2, length=7, padded=False)["input_ids"]
    whole = functools.partial(model, input_ids=ids) if family == "bart" else model
    named = "decoder_input_ids" if family == "bart" else "input_ids"
    wanted = ids[:, :5]
    for _ in range(6):  # without any cache
        wanted = torch.cat([wanted, whole(**{named: wanted}, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    hf_attn_patch.enable(model, cuda_graphs=True)
    cache: Any = GrowingCache(config=model.config)
    given: dict[str, Any] = {}
    if family == "bart":
        assert isinstance(model, BartForConditionalGeneration)
        cache, given = EncoderDecoderCache(cache, DynamicCache()), {"encoder_outputs": model.model.encoder(ids)}
    found = ids[:, :5]
    for at in [slice(None)] + [slice(-1, None)] * 5:
        out = call(model, way, cache, **{named: found[:, at]}, use_cache=True, **given)
        assert cache_of(out) is cache
        found = torch.cat([found, out.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, wanted)
    assert decoding.recorded(model) == 1
    model.train()  # what is not recorded gets the cache too
    call(model, way, cache, **{named: found[:, -1:]}, use_cache=True, **given)
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_unpadded(family: str, side: str, way: str) -> None:
    """One packed prompt, then a step that is not packed: the keys and values of a forward that saw all at once."""
    model, inputs = padded.build(*padded.CAUSAL[family]), padded.batch(side, labels=False)
    mask, widths = inputs["attention_mask"], []
    stock = DynamicCache(config=model.config)
    expected = model(**inputs, **{Arguments(model).cache: stock}, use_cache=True).logits
    step = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1)}
    then = model(**step, **{Arguments(model).cache: stock}, use_cache=True).logits
    mine = DynamicCache(config=model.config)
    with unpadded(model):
        model.get_input_embeddings().register_forward_hook(lambda m, args, out: widths.append(tuple(out.shape[:2])))
        out = call(model, way, mine, **inputs, use_cache=True)
        again = call(model, way, mine, **step, use_cache=True)
    assert widths == [(1, int(mask.sum())), (len(mask), 1)]
    assert cache_of(out) is mine
    assert cache_of(again) is mine
    torch.testing.assert_close(out.logits[mask == 1], expected[mask == 1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again.logits, then, rtol=1e-3, atol=1e-4)
    for a, b in zip(mine.layers, stock.layers, strict=True):
        assert a.keys.shape == b.keys.shape


def test_one_row_without_padding_fills_the_cache_it_is_given() -> None:
    """B = 1: nothing to pack, and the renamed cache must reach the forward all the same."""
    model = padded.build(*padded.CAUSAL["llama"])
    ids = torch.arange(1, 8)[None]
    for way in WAYS:
        cache = DynamicCache(config=model.config)
        with unpadded(model):
            out = call(model, way, cache, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        assert cache.get_seq_length() == 7
        assert cache_of(out) is cache


def test_the_old_names_are_not_used(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """They warn in transformers 5.24."""
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    model, inputs = decoding.build("llama", "cpu"), decoding.batch("cpu")
    hf_attn_patch.enable(model, cache="growing", cuda_graphs=True)
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING), unpadded(model):
        warnings.simplefilter("always")
        mine = GrowingCache(config=model.config)
        out = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **{generate_keyword(): mine}
        )
        assert cache_of(out) is mine
    said = [str(warning.message) for warning in caught] + caplog.messages
    assert not [text for text in said if "past_key_values" in text or "deprecated" in text]


@pytest.mark.parametrize("cache", ["dynamic", "static", "growing, but sdpa", "growing, but hooked"])
def test_what_is_not_recorded_says_so_once(
    cache: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    model, inputs = decoding.build("llama", "cpu"), decoding.batch("cpu", padded=False)
    expected = decoding.generate(model, inputs, max_new_tokens=6)
    hf_attn_patch.enable(model, cuda_graphs=True)
    made: Any = GrowingCache(config=model.config)
    why = "it has hooks (model.layers.0)"
    if cache == "dynamic":
        made, why = (
            DynamicCache(config=model.config),
            "its cache is a DynamicCache and no GrowingCache: enable(cache=",
        )
    elif cache == "static":
        made, why = StaticCache(config=model.config, max_cache_len=64), "its cache is a StaticCache"
    elif cache == "growing, but sdpa":
        model.set_attn_implementation("sdpa")
        why = "its attn_implementation is 'sdpa' and not 'hf_attn_patch'"
    else:
        model.model.layers[0].register_forward_hook(lambda *_: None)
    for _ in range(2):
        kwargs = {generate_keyword(): copy.deepcopy(made), "disable_compile": True}
        assert torch.equal(decoding.generate(model, inputs, max_new_tokens=6, **kwargs), expected)
    (said,) = [r for r in caplog.records if "decoding steps of LlamaForCausalLM are not recorded" in r.getMessage()]
    assert said.levelname == "WARNING"
    assert why in said.getMessage()


def test_prompts_of_one_token_are_no_steps_and_need_no_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    model, inputs = decoding.build("llama", "cpu"), decoding.batch("cpu", length=1, padded=False)
    expected = decoding.generate(model, inputs, max_new_tokens=6)
    hf_attn_patch.enable(model, cache="growing", cuda_graphs=True)
    assert torch.equal(decoding.generate(model, inputs, max_new_tokens=6), expected)
    assert not caplog.messages


def test_steps_of_embeddings_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    model, ids = decoding.build("llama", "cpu"), decoding.batch("cpu", rows=2, length=9, padded=False)["input_ids"]
    states = model.get_input_embeddings()(ids)
    wanted = model(input_ids=ids, use_cache=False).logits
    hf_attn_patch.enable(model, cuda_graphs=True)
    cache = GrowingCache(config=model.config)
    parts = [states[:, :4], *states[:, 4:].split(1, 1)]
    found = [call(model, "cache", cache, inputs_embeds=part, use_cache=True).logits for part in parts]
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-4, atol=1e-5)
    assert decoding.recorded(model) == 1


@pytest.mark.parametrize(
    ("attention", "cache", "why"),
    [
        ("sdpa", None, "attn_implementation='sdpa' finds no borders: hf_attn_patch.enable"),
        ("hf_attn_patch", "static", "this call fills a StaticCache"),
        ("hf_attn_patch", "offloaded", "this call fills an offloaded cache"),
    ],
)
def test_a_prompt_that_keeps_its_padding_says_so_once(
    attention: str, cache: str | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = padded.build(*padded.CAUSAL["llama"], attention), padded.batch("left", labels=False)
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloading needs a GPU")
    kwargs = {} if cache is None else {"cache_implementation": cache}
    with unpadded(model):
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=3, do_sample=False, **kwargs)
        full = torch.ones_like(inputs["attention_mask"])
        model.generate(inputs["input_ids"], attention_mask=full, max_new_tokens=3, do_sample=False)
    (said,) = [r.getMessage() for r in caplog.records if "keep its padding" in r.getMessage()]
    assert why in said
