"""A cache of codes on a GPU: read as it is, recorded, and shared, with the tokens that it gives as numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import batch, build, generate, recorded

import hf_attn_patch
from hf_attn_patch.attn.codes import KINDS
from hf_attn_patch.attn.shared import Parted
from hf_attn_patch.cache import beginnings

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("answers", [1, 3])
def test_same_tokens_read_as_codes_and_as_numbers(
    family: str, kind: str, answers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beginnings, "SHARE_FROM", 1)
    model, inputs = build(family, "cuda"), batch("cuda", 3)
    options: dict[str, Any] = {"num_return_sequences": answers, "do_sample": answers > 1}
    hf_attn_patch.enable(model, cache=kind, cuda_graphs=False, backend="reference")
    expected = generate(model, inputs, **options)
    monkeypatch.setattr(Parted, "make", lambda self, which: pytest.fail("numbers were made of the codes"))
    hf_attn_patch.enable(model, cache=kind, cuda_graphs=False)
    assert torch.equal(generate(model, inputs, **options), expected)
    hf_attn_patch.enable(model, cache=kind, cuda_graphs=True)
    torch.manual_seed(1)
    options |= {"max_new_tokens": 60, "return_dict_in_generate": True}
    out = model.generate(**inputs, **options)
    assert torch.equal(out.sequences, expected)
    assert recorded(model) == 1
