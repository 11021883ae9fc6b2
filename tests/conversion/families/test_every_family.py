"""Every family whose config has a field for KV heads has a row or a reason, and every row is held to three truths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import tensors
from every_family import known_here, model_of, repeated, with_kv_heads
from huggingface_hub.errors import StrictDataclassError
from shared_heads import share_heads
from transformers.models.auto import modeling_auto

from hf_attn_patch.conversion import ConversionError, convert, plan
from hf_attn_patch.conversion.families.refused import REFUSED
from hf_attn_patch.conversion.families.table import family_of, supported

IDS = torch.tensor([[5, 9, 33, 2, 17, 60, 41]])
KV_FIELDS = {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "multi_query", "swa_num_key_value_heads"}
#: tables of transformers whose models write text
TABLES = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
#: their KV heads stand in a config inside, or their text model is described under another name
ELSEWHERE = {
    "gemma4_assistant": "reads the keys and values of the model that it drafts for",
}


def with_kv_field() -> dict[str, set[str]]:
    """model_type of every text model here whose config has a field for KV heads, and the models that it is part of."""
    found: dict[str, set[str]] = {}
    names = {name for table in TABLES for name in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {})}
    for model_type in sorted(names - ELSEWHERE.keys()):
        if model_type in transformers.CONFIG_MAPPING:
            try:
                text = transformers.CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
            except (
                ValueError,
                TypeError,
                StrictDataclassError,
            ):  # made of several models, whose configs it must be given (MusicGen)
                continue
            fields = {*getattr(text, "__dataclass_fields__", ()), *getattr(text, "attribute_map", ())}
            if KV_FIELDS & fields and text.model_type:
                found.setdefault(text.model_type, set()).add(model_type)
    return found


def test_every_family_with_a_field_has_a_row_or_a_reason() -> None:
    refused = {name for names in REFUSED.values() for name in names}
    assert not refused & set(supported())
    known = refused | set(supported())
    missing = {name: parts for name, parts in with_kv_field().items() if name not in known and not parts <= known}
    assert not missing, f"families without a row in decoder_rows.py or a reason in refused.py: {missing}"


def test_every_encoder_decoder_that_hears_has_a_row_or_a_reason() -> None:
    refused = {name for names in REFUSED.values() for name in names}
    hearing = {
        name
        for name in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
        if name != "speech-encoder-decoder"  # its decoder is of a family by itself
        and getattr(transformers.CONFIG_MAPPING[name], "is_encoder_decoder", False) is True
    }
    missing = hearing - refused - set(supported())
    assert {"whisper", "speech_to_text", "moonshine"} <= hearing and not missing, missing


@pytest.mark.parametrize("model_type", sorted(name for names in REFUSED.values() for name in names))
def test_a_refusal_says_why(model_type: str) -> None:
    with pytest.raises(ConversionError, match=f"'{model_type}' cannot be converted: "):
        family_of(model_type)


def out(model: Any) -> torch.Tensor:
    """Logits, or the last hidden states of a text model alone."""
    given = {"input_ids": IDS, "use_cache": False}
    if model.config.model_type == "voxtral_realtime_text":  # its delay
        given["t_cond"] = torch.full((1, 1, model.config.hidden_size), 0.1)
    with torch.no_grad():
        return model(**given)[0]


def reloaded(model: Any, folder: Path) -> Any:
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return again.eval()


@pytest.mark.parametrize("model_type", known_here())
def test_as_many_heads_is_the_same_model_and_the_fewest_run(model_type: str, tmp_path: Path) -> None:
    model = model_of(with_kv_heads(model_type, 8))
    model.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "same", 8, method="mean", check_load=False)
    before, after = tensors(tmp_path / "src"), tensors(tmp_path / "same")
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(out(reloaded(model, tmp_path / "same")), out(model), rtol=1e-5, atol=1e-5)
    least = 2 if model_type == "diffllama" else 1
    convert(tmp_path / "src", tmp_path / "dst", least, method="mean")
    again = reloaded(model, tmp_path / "dst")
    assert out(again).isfinite().all()
    assert out(again).shape == out(model).shape


@pytest.mark.parametrize("model_type", known_here())
def test_repeated_heads_come_back_bit_by_bit(model_type: str, tmp_path: Path) -> None:
    small = model_of(with_kv_heads(model_type, 2))
    big = model_of(with_kv_heads(model_type, 8))
    repeated(small, big)
    want = out(small)
    torch.testing.assert_close(out(big), want, rtol=1e-3, atol=1e-3)
    big.save_pretrained(tmp_path / "src")
    small.save_pretrained(tmp_path / "want")
    convert(tmp_path / "src", tmp_path / "dst", 2, method="mean", check_load=False)
    expected, got = tensors(tmp_path / "want"), tensors(tmp_path / "dst")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    torch.testing.assert_close(out(reloaded(small, tmp_path / "dst")), want, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("mllama_text_model" not in known_here(), reason="unknown to this transformers")
def test_attentions_that_share_a_field_have_one_number(tmp_path: Path) -> None:
    model_of(with_kv_heads("mllama_text_model", 8)).save_pretrained(tmp_path / "src")
    with pytest.raises(ConversionError, match="one num_key_value_heads for self and cross: give them the same number"):
        plan(tmp_path / "src", {"self": 2})
    assert {layer.new_kv_heads for layer in plan(tmp_path / "src", {"self": 2, "cross": 2}).layers} == {2}


@pytest.mark.parametrize("model_type", ["dory", "flint", "granite_swa", "granitemoe_swa", "lfm3", "mimo_v2_flash"])
def test_what_stands_beside_the_projections_by_the_names_of_the_model(model_type: str, tmp_path: Path) -> None:
    """Sinks and gates have other names in published checkpoints; transformers can save them by its own too."""
    if model_type not in known_here():
        pytest.skip("unknown to this transformers")
    model_of(with_kv_heads(model_type, 8)).save_pretrained(tmp_path / "src", save_original_format=False)
    made = plan(tmp_path / "src", 2, method="aligned")
    written = {name for unit in made.units for name in unit.writes}
    assert any(name.endswith("self_attn.sinks") for name in written) == model_type.startswith("granite")  # by heads


#: families in whose forward something stands after the keys, or after the values, that knows their basis
KEYS_KNOWN = {
    "afmoe", "apertus1p5_text", "beam", "diffusion_gemma_text", "dory", "dots1", "flint", "gemma3n_text", "gemma4_text",
    "gemma4_unified_text", "glm4_moe", "hunyuan_v1_moe", "hunyuan_vl_text", "hy_v3", "kolibri1", "laguna", "lara_mini",
    "lfm2", "lfm2_moe", "lfm3", "llama4_text", "mellum", "mllama_text_model", "molmo2_text", "muse_glimmer_text",
    "muse_spark_text", "nanochat",
    "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen3_omni_moe_text", "qwen3_vl_moe_text",
    "qwen4_exp_text", "sarvam_moe", "step3p5",
}  # fmt: skip
VALUES_KNOWN = {
    "afmoe", "beam", "bitnet", "diffllama", "diffusion_gemma_text", "dory", "gemma3n_text", "gemma4_text",
    "gemma4_unified_text", "laguna", "muse_glimmer_text", "muse_spark_text", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_next",
    "qwen4_exp_text",
}  # fmt: skip


@pytest.mark.parametrize("model_type", known_here())
def test_heads_that_are_one_in_several_bases(model_type: str, tmp_path: Path) -> None:
    """``aligned`` loses nothing of them: RoPE's planes, gates and norms are where the row says."""
    model = model_of(with_kv_heads(model_type, 8))
    model.save_pretrained(tmp_path / "src")
    made = plan(tmp_path / "src", 2, method="aligned", check_load=False)
    share_heads(made, tmp_path / "src", 2, keys=model_type not in KEYS_KNOWN, values=model_type not in VALUES_KNOWN)
    record = convert(tmp_path / "src", tmp_path / "dst", 2, method="aligned", check_load=False)
    before, after = (out(type(model).from_pretrained(tmp_path / d).eval()) for d in ("src", "dst"))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    assert bool(record["details"]["keys_averaged"]) == (model_type in KEYS_KNOWN)
    assert bool(record["details"]["values_averaged"]) == (model_type in VALUES_KNOWN)
