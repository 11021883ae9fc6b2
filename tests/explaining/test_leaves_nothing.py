"""A rehearsal leaves nothing behind that a real forward would meet."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from family_inputs import make_inputs
from family_runs import build

import hf_attn_patch
from hf_attn_patch.compat.stand_in import rehearsal, stand_in


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


def test_what_is_remembered_of_an_operator_tells_its_arguments_apart() -> None:
    """1, True and 1.0 are equal, and give numbers of other types; a slice is not what it was taken from."""
    weight = torch.empty(6, 4, device="meta")
    with rehearsal(torch.device("cpu")):
        for number, dtype in 2 * ((1, torch.int64), (True, torch.bool), (1.0, torch.float32)):
            assert torch.full((1 << 25,), number).dtype == dtype
            whole = stand_in(weight, torch.device("cpu"))
            assert (whole @ whole.T).shape == (6, 6) and (whole[:3] @ whole.T).shape == (3, 6)
            assert whole.T.stride() == (1, 4) and whole.T.contiguous().stride() == (6, 1)
            values, places = whole.topk(2)
            assert (values.dtype, places.dtype) == (torch.float32, torch.int64)
            assert whole.add_(number) is whole
