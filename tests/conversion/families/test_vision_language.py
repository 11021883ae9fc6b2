"""Vision-language models: the language model inside is converted, the rest is left as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import tensors
from click.testing import CliRunner
from vlms import VLMS

from hf_attn_patch.cli import main
from hf_attn_patch.conversion import ConversionError, convert

IDS = torch.tensor([[5, 9, 33, 2, 17, 60, 41]])


@pytest.mark.parametrize("model_type", list(VLMS))
def test_the_language_model_inside_a_vlm(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **VLMS[model_type])
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", kv_heads=2)
    before, after = tensors(tmp_path / "src"), tensors(tmp_path / "dst")
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed
    assert all(".self_attn." in name and "vision" not in name and "visual" not in name for name in changed)
    for name in before.keys() - changed:
        assert torch.equal(before[name], after[name])
    loaded, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "dst", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded(IDS, use_cache=True).past_key_values.layers[0].keys.shape[1] == 2
    assert "language model" in CliRunner().invoke(main, ["inspect", str(tmp_path / "dst")]).stdout


def test_code_cannot_come_along_for_a_part(tmp_path: Path) -> None:
    """BLIP-2's OPT becomes a class of this package, and transformers' BLIP-2 takes no code for it: said as it is."""
    torch.manual_seed(0)
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**part, "image_size": 16, "patch_size": 8},
        qformer_config={**part, "vocab_size": 64, "encoder_hidden_size": 16},
        text_config={
            "model_type": "opt", "vocab_size": 64, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2,
            "num_attention_heads": 8, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
        },
        num_query_tokens=2,
    )  # fmt: skip
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(tmp_path / "src")
    with pytest.raises(ConversionError, match=r"becomes gqa_opt.*must be installed and imported"):
        convert(tmp_path / "src", tmp_path / "dst", 2, method="mean", with_code=True)
    convert(tmp_path / "src", tmp_path / "dst", 2, method="mean")
    again = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "dst")
    assert type(again.language_model).__name__ == "GroupedOPTForCausalLM"


def test_a_flat_config_of_an_older_qwen2_vl(tmp_path: Path) -> None:
    """Checkpoints on the hub have the language model's numbers at the top of config.json."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("qwen2_vl", **VLMS["qwen2_vl"])
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "src")
    raw = json.loads((tmp_path / "src" / "config.json").read_text())
    text = raw.pop("text_config")
    (tmp_path / "src" / "config.json").write_text(json.dumps({**text, **raw}))
    convert(tmp_path / "src", tmp_path / "dst", kv_heads=4)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "dst")
    assert loaded.config.text_config.num_key_value_heads == 4
