"""Every family that generates, with tokens chosen inside recorded steps: the same tokens as without, or the old way."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from families import FAMILIES, families
from family_inputs import make_inputs
from family_runs import IMPLEMENTATION, build

import hf_attn_patch
from hf_attn_patch.decoding import cuda_graphs as graphs

GENERATING = [name for name in families() if FAMILIES[name].generates]
WAYS: list[dict[str, Any]] = [{}, {"do_sample": True, "temperature": 0.9, "top_k": 20, "repetition_penalty": 1.2}]


@pytest.mark.parametrize("name", GENERATING)
def test_the_same_tokens(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    caplog.set_level(logging.INFO, logger="hf_attn_patch")
    model: Any = build(name, IMPLEMENTATION)
    given = make_inputs(FAMILIES[name], "left", S=9).kwargs
    prompt = {key: value for key, value in given.items() if not key.startswith("decoder_")}
    options = {"max_new_tokens": 12, "min_new_tokens": 12}

    def generate(way: dict[str, Any]) -> torch.Tensor:
        torch.manual_seed(1)
        out: torch.Tensor = model.generate(**prompt, **{"do_sample": False, **options, **way})
        return out

    hf_attn_patch.enable(model, cache="growing", cuda_graphs=False)
    expected = [generate(way) for way in WAYS]
    hf_attn_patch.enable(model)
    for way, tokens in zip(WAYS, expected, strict=True):
        for _ in range(2):
            assert torch.equal(generate(way), tokens)
    assert not [message for message in caplog.messages if "Error: " in message]  # a reason, and no accident
