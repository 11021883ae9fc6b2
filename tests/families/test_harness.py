"""The comparisons of this folder can fail: each is shown an implementation that forgets one thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from family_inputs import make_inputs
from family_runs import IMPLEMENTATION, assert_close, pair, run
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize(
    ("name", "forgotten"),
    [
        ("gemma2", "softcap"),
        ("gpt_oss", "s_aux"),
        ("t5", "position_bias"),
        ("umt5", "position_bias"),
        ("granite", "scaling"),
        ("mistral", "attention_mask"),
        ("bert", "attention_mask"),
        ("bart", "attention_mask"),
        ("llama4_text", "attention_mask"),
        ("beit", "attention_mask"),
    ],
)
def test_what_is_forgotten_is_noticed(name: str, forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]

    def forgetful(module: Any, q: Any, k: Any, v: Any, attention_mask: Any, **kwargs: Any) -> Any:
        if forgotten == "attention_mask":
            attention_mask = None
        kwargs.pop(forgotten, None)
        return whole(module, q, k, v, attention_mask, **kwargs)

    ours, eager = pair(name)
    inputs = make_inputs(FAMILIES[name], "none" if name == "beit" else "left")
    with torch.no_grad():
        wanted = run(eager, inputs)
        assert_close(run(ours, inputs), wanted)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, IMPLEMENTATION, forgetful)
        with pytest.raises(AssertionError, match="error"):
            assert_close(run(ours, inputs), wanted)


def test_the_registry_is_as_wide_as_it_says() -> None:
    kinds = {family.kind for family in FAMILIES.values()}
    assert len(FAMILIES) >= 78
    assert kinds >= {"decoder", "encoder", "encoder-decoder", "vision", "text-vision", "speech", "speech-to-text"}
    for trait in ("window", "chunk", "sink", "softcap", "bias", "moe", "dv", "overlay", "cu_seqlens"):
        assert any(trait in family.traits for family in FAMILIES.values()), trait
