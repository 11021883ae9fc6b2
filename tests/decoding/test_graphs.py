"""Recorded decoding steps where there are no CUDA graphs: a recording is then the work done again, so that all around
it is tested everywhere; and the compiled steps, which are the same code on every device."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from decoding import FAMILIES, batch, build, generate, recorded

import hf_attn_patch
from hf_attn_patch.decoding import cuda_graphs as graphs
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
    with pytest.raises(AttentionError, match="'compile' is not known; choose True, 'compiled' or False"):
        hf_attn_patch.enable(build("llama", "cpu"), cuda_graphs="compile")
