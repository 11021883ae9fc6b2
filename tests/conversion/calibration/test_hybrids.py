"""The default method on decoders that are no Llama: merged by what their layers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from every_family import known_here, model_of, repeated, with_kv_heads

from hf_attn_patch.conversion import convert

IDS = torch.tensor([[5, 9, 33, 2, 17, 60, 41]])
#: one of each kind: convolutions, linear attention and gates, state spaces, values that know their basis, two widths
KINDS = ("lfm2", "qwen3_next", "jamba", "gemma4_text", "mimo_v2_flash", "llama4_text", "zamba", "afmoe")


def source(model_type: str, folder: Path) -> Any:
    """Eight KV heads of which each is there four times."""
    big = model_of(with_kv_heads(model_type, 8))
    repeated(model_of(with_kv_heads(model_type, 2)), big)
    big.save_pretrained(folder)
    return big


@pytest.mark.parametrize("model_type", [name for name in KINDS if name in known_here()])
def test_repeated_heads_lose_nothing_by_default(model_type: str, tmp_path: Path) -> None:
    big = source(model_type, tmp_path / "src")
    record = convert(tmp_path / "src", tmp_path / "dst", 2, calibration_tokens=256, device="cpu")
    assert record["method"] == "calibrated"
    assert record["details"]["held_out"]["kl"] < 1e-4
    small = type(big).from_pretrained(tmp_path / "dst").eval()
    with torch.no_grad():
        want, got = big(IDS, use_cache=False).logits, small(IDS, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_names_that_the_model_has_not_leave_the_weights_alone(tmp_path: Path) -> None:
    """EXAONE's checkpoints call their layers otherwise than the class that reads them: told, and still converted."""
    big = source("exaone", tmp_path / "src")
    record = convert(tmp_path / "src", tmp_path / "dst", 2, device="cpu")
    (note,) = record["details"]["notes"]
    assert note.startswith("heads were merged by what layers read on random inputs: LlamaForCausalLM has 0 modules")
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst").eval()
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, big(IDS).logits, rtol=1e-3, atol=1e-3)
