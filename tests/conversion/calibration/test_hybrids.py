"""The default method on decoders that are no Llama: merged by what their layers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from every_family import config_of, known_here, model_of, repeated, with_kv_heads
from tiny import python_sources, trained_tokenizer
from vlms import VLMS

from hf_attn_patch.conversion import ConversionError, convert

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


@pytest.mark.skipif("exaone" not in known_here(), reason="unknown to this transformers")
def test_names_that_the_model_has_not_leave_the_weights_alone(tmp_path: Path) -> None:
    """EXAONE's checkpoints call their layers otherwise than the class that reads them: told, and still converted."""
    big = source("exaone", tmp_path / "src")
    record = convert(tmp_path / "src", tmp_path / "dst", 2, device="cpu")
    (note,) = record["details"]["notes"]
    assert note.startswith("heads were merged by what layers read on random inputs: LlamaForCausalLM has another name")
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst").eval()
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, big(IDS).logits, rtol=1e-3, atol=1e-3)


def with_text(model: Any, folder: Path) -> dict[str, Any]:
    """Saved with a tokenizer; a text beside it, and what to calibrate with."""
    model.save_pretrained(folder / "src")
    trained_tokenizer().save_pretrained(folder / "src")
    (folder / "text.txt").write_text("".join(p.read_text() for p in python_sources())[:40_000])
    text = str(folder / "text.txt")
    return {"calibrate": text, "calibration_tokens": 3000, "calibration_length": 24, "device": "cpu"}


@pytest.mark.parametrize(
    "model_type", [n for n in ("lfm2", "qwen3_next", "nemotron_h", "gemma4_text") if n in known_here()]
)
def test_text_goes_through_the_layers_without_attention_too(model_type: str, tmp_path: Path) -> None:
    """That layer by layer is what the model does is checked on the way; every attention fits better than merged."""
    more = {"vocab_size_per_layer_input": 512} if model_type == "gemma4_text" else {}
    model = model_of(config_of(model_type, vocab_size=512, **more))
    record = convert(tmp_path / "src", tmp_path / "dst", 2, **with_text(model, tmp_path))
    layers = record["details"]["layers"]
    assert list(layers)
    assert all(found["refitted"] < found["error"] for found in layers.values())


def test_layers_that_need_each_other_are_told_and_the_whole_is_calibrated(tmp_path: Path) -> None:
    """Zamba's layers read the embeddings too: not one after the other, but with a last pass over all of them."""
    model = model_of(config_of("zamba", vocab_size=512))
    known = with_text(model, tmp_path)
    with pytest.raises(ConversionError, match=r"cannot be run by itself .*--no-refit --polish"):
        convert(tmp_path / "src", tmp_path / "dst", 2, **known)
    record = convert(tmp_path / "src", tmp_path / "dst", 2, **known, refit=False, polish=2000)
    assert record["details"]["polish"]["tokens"] == 2000
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst")(IDS).logits.isfinite().all()


@pytest.mark.parametrize("model_type", list(VLMS))
def test_the_language_model_inside_a_vlm_is_calibrated_on_text(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inside = {**VLMS[model_type]["text_config"], "vocab_size": 512}
    config = transformers.AutoConfig.for_model(model_type, **{**VLMS[model_type], "text_config": inside})
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    record = convert(tmp_path / "src", tmp_path / "dst", 2, **with_text(model, tmp_path))
    assert record["method"] == "calibrated"
    layers = record["details"]["layers"]
    assert len(layers) == 2
    assert all(found["refitted"] < found["error"] and "vis" not in prefix for prefix, found in layers.items())
    convert(tmp_path / "src", tmp_path / "mean", 2, method="mean")
    ids = torch.randint(3, 500, (4, 24), generator=torch.Generator().manual_seed(1))
    want, *others = (
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / d).eval() for d in ("src", "dst", "mean")
    )
    with torch.no_grad():
        near, far = (float((m(ids).logits - want(ids).logits).norm()) for m in others)
    assert near < far
