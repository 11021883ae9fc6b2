"""Decoding with every cache: the tokens and their logits are eager's."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from families import FAMILIES, families
from family_inputs import make_inputs, tokens
from family_runs import assert_close, build, pair
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import QuantizedLayer
from transformers.masking_utils import create_chunked_causal_mask

_GENERATING = [name for name in families() if FAMILIES[name].generates]
_CORE = [name for name in families(trait="core") if FAMILIES[name].generates]

_CHUNKED_LACKS_BLOCKS = "block_sequence_ids" not in inspect.signature(create_chunked_causal_mask).parameters


def _prompt(name: str, padding: str) -> dict[str, Any]:
    inputs = make_inputs(FAMILIES[name], padding, S=9).kwargs
    return {key: value for key, value in inputs.items() if not key.startswith("decoder_")}


def _generate(model: Any, prompt: dict[str, Any], **kwargs: Any) -> Any:
    options = {"max_new_tokens": 7, "do_sample": False, **kwargs}
    # no early end: all rows run to the full length
    options["min_new_tokens"] = options["max_new_tokens"]
    return model.generate(**prompt, **options, return_dict_in_generate=True, output_logits=True)


def _assert_same(ours: Any, eager: Any) -> None:
    assert torch.equal(ours.sequences, eager.sequences)
    steps = [{f"step {i}": logits for i, logits in enumerate(o.logits)} for o in (ours, eager)]
    assert_close(*steps, rtol=2e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", _GENERATING)
def test_greedy(name: str, padding: str, cache: str) -> None:
    if cache == "static" and "chunk" in FAMILIES[name].traits and _CHUNKED_LACKS_BLOCKS:
        pytest.skip("generate of this transformers passes its own chunked mask an argument that it does not take")
    ours, eager = pair(name)
    prompt = _prompt(name, padding)
    kwargs = {"cache_implementation": "static"} if cache == "static" else {}
    _assert_same(_generate(ours, prompt, **kwargs), _generate(eager, prompt, **kwargs))


@pytest.mark.parametrize("name", _CORE)
def test_beam_search(name: str) -> None:
    ours, eager = pair(name)
    kwargs: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "output_scores": True}
    found, wanted = _generate(ours, _prompt(name, "left"), **kwargs), _generate(eager, _prompt(name, "left"), **kwargs)
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", _CORE)
def test_assisted(name: str) -> None:
    """An assistant that agrees now and then: the model verifies several candidates in one forward."""
    ours, eager = pair(name)
    assistant, other = build(name, ours.config._attn_implementation), build(name, "eager")
    for model in (assistant, other):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02)
    prompt = {key: value[:1] for key, value in _prompt(name, "none").items()}
    kwargs: dict[str, Any] = {"max_new_tokens": 12}
    plain = _generate(eager, prompt, **kwargs)
    lengths: list[int] = []
    handle = ours.register_forward_pre_hook(
        lambda _, args, kw: lengths.append(kw.get("decoder_input_ids", kw.get("input_ids")).shape[1]), with_kwargs=True
    )
    found = _generate(ours, prompt, assistant_model=assistant, **kwargs)
    handle.remove()
    assert any(1 < length <= 16 for length in lengths[1:]), "no step verified several candidates"
    assert torch.equal(found.sequences, plain.sequences)


class _Int8Layer(QuantizedLayer):
    """Symmetric 8-bit quantisation, so that the quantised cache needs no package."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = tensor.abs().amax(dim=-1, keepdim=True).clamp_min(1e-6) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return q_tensor[0] * q_tensor[1]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_quantized_cache(name: str) -> None:
    ours, eager = pair(name)
    prompt = _prompt(name, "left")

    def cache() -> Cache:
        return Cache(layers=[_Int8Layer(nbits=8, residual_length=3) for _ in range(FAMILIES[name].calls)])

    found, wanted = (_generate(m, prompt, past_key_values=cache()) for m in (ours, eager))
    exact = _generate(eager, prompt)
    # rounding to 8 bits is a step function: a last-bit difference before it may come out as one step
    assert_close(*({str(i): x for i, x in enumerate(o.logits)} for o in (found, wanted)), rtol=2e-3)
    assert not torch.equal(torch.stack(wanted.logits), torch.stack(exact.logits)), "nothing was quantised"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", families("decoder"))
def test_several_tokens_on_a_cache(name: str, cache: str) -> None:
    """Chunks of 6, 4, 1, 3 and 1 tokens on a growing cache give what one forward over all 15 gives."""
    ours, eager = pair(name)
    ids = tokens(2, 15)
    with torch.no_grad():
        wanted = eager(input_ids=ids, use_cache=False).logits
        past = DynamicCache(config=ours.config) if cache == "dynamic" else StaticCache(ours.config, max_cache_len=20)
        found, start = [], 0
        for length in (6, 4, 1, 3, 1):
            chunk = ids[:, start : start + length]
            found.append(ours(input_ids=chunk, past_key_values=past, use_cache=True).logits)
            start += length
    assert_close({"logits": torch.cat(found, dim=1)}, {"logits": wanted}, rtol=2e-5)


@pytest.mark.parametrize("padding", ["left", "holes"])
@pytest.mark.parametrize("name", _CORE)
def test_several_tokens_on_a_padded_cache(name: str, padding: str) -> None:
    """The same with a 2-D mask that grows with the cache."""
    family = FAMILIES[name]
    if family.kind != "decoder":
        pytest.skip("decoder-only")
    ours, eager = pair(name)
    inputs = make_inputs(family, padding, S=15).kwargs
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        wanted = eager(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        past, found, start = DynamicCache(config=ours.config), [], 0
        for length in (6, 4, 1, 3, 1):
            piece = slice(start, start + length)
            found.append(
                ours(
                    input_ids=ids[:, piece],
                    attention_mask=mask[:, : start + length],
                    position_ids=positions[:, piece],
                    past_key_values=past,
                ).logits
            )
            start += length
    valid = mask.bool()
    assert_close({"logits": torch.cat(found, dim=1)[valid]}, {"logits": wanted[valid]}, rtol=2e-5)


@pytest.mark.parametrize("name", families("encoder-decoder"))
def test_encoder_decoder_cache(name: str) -> None:
    """Several decoder tokens at a time on an EncoderDecoderCache, the encoder padded."""
    ours, eager = pair(name)
    inputs = make_inputs(FAMILIES[name], "right", S=11, S_decoder=12)
    kwargs, ids = inputs.kwargs, inputs.kwargs["decoder_input_ids"].clamp(min=10)
    common = {"attention_mask": kwargs["attention_mask"]}
    with torch.no_grad():
        wanted = eager(input_ids=kwargs["input_ids"], decoder_input_ids=ids, use_cache=False, **common).logits
        encoded = ours.get_encoder()(input_ids=kwargs["input_ids"], **common)
        text = ours.config.get_text_config(decoder=True)
        past, found, start = EncoderDecoderCache(DynamicCache(config=text), DynamicCache()), [], 0
        for length in (5, 3, 1, 2, 1):
            chunk = ids[:, start : start + length]
            found.append(ours(encoder_outputs=encoded, decoder_input_ids=chunk, past_key_values=past, **common).logits)
            start += length
    assert_close({"logits": torch.cat(found, dim=1)}, {"logits": wanted}, rtol=2e-5)


@pytest.mark.parametrize("name", families("image-chat", "patches-chat"))
def test_chat_about_an_image(name: str) -> None:
    ours, eager = pair(name)
    prompt = make_inputs(FAMILIES[name], "left", S=9).kwargs
    _assert_same(_generate(ours, prompt), _generate(eager, prompt))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_transcribe(cache: str) -> None:
    ours, eager = pair("whisper")
    prompt = {"input_features": make_inputs(FAMILIES["whisper"]).kwargs["input_features"]}
    kwargs = {"cache_implementation": "static"} if cache == "static" else {}
    found, wanted = (m.generate(**prompt, **kwargs, max_new_tokens=7, do_sample=False) for m in (ours, eager))
    assert torch.equal(found, wanted)
