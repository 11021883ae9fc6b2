"""A rehearsal leaves nothing behind that a real forward would meet."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from family_inputs import make_inputs
from family_runs import build

import hf_attn_patch


@pytest.mark.parametrize("name", ["beit", "swin", "data2vec-vision", "llama"])
def test_what_models_keep_for_the_whole_process_holds_no_stand_ins(name: str) -> None:
    """BEiT keeps its index of positions in an lru_cache of the class."""
    if name not in FAMILIES:
        pytest.skip("no such family here")
    inputs = make_inputs(FAMILIES[name], "none")
    hf_attn_patch.explain(build(name, "hf_attn_patch"), batch=2)
    for implementation in ("hf_attn_patch", "eager"):
        with torch.no_grad():
            outputs = build(name, implementation)(**inputs.kwargs)
        for value in outputs.values():
            if isinstance(value, torch.Tensor):
                assert type(value) is torch.Tensor and value.isfinite().all()
