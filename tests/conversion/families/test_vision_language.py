"""Vision-language models: the language model inside is converted, the rest is left as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import tensors
from click.testing import CliRunner
from vlms import VLMS

from hf_attn_patch.cli import main
from hf_attn_patch.conversion import ConversionError, convert, inspect_source
from hf_attn_patch.conversion.families.config import part_of, read_config

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
    record = convert(tmp_path / "src", tmp_path / "dst", 2, method="aligned")
    assert record["details"]["notes"] == []  # OPT was run by itself, with the numbers that it has here
    again = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "dst")
    assert type(again.language_model).__name__ == "GroupedOPTForCausalLM"
    assert "`gqa_opt`: `import hf_attn_patch`" in (tmp_path / "dst" / "README.md").read_text()


def test_the_decoder_of_a_model_put_together_of_two(tmp_path: Path) -> None:
    torch.manual_seed(0)
    part = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 8}
    decoder = transformers.BertConfig(vocab_size=64, is_decoder=True, add_cross_attention=True, **part)
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(image_size=16, patch_size=8, **part), decoder
    )
    model = transformers.VisionEncoderDecoderModel(both).eval()
    with torch.no_grad():
        for name, weight in model.decoder.named_parameters():  # heads that are equal within their groups
            if name.endswith(("key.weight", "value.weight", "key.bias", "value.bias")):
                weight.copy_(weight.view(2, 4, 4, -1)[:, :1].expand(2, 4, 4, -1).reshape(weight.shape))
    model.save_pretrained(tmp_path / "src")
    facts = inspect_source(tmp_path / "src", 64)
    assert facts["language_model"] == "bert"
    assert facts["kv_bytes_per_token"] == 2 * 2 * (2 * 8 * 4) * 4  # two layers, own and cross, K and V, fp32
    record = convert(tmp_path / "src", tmp_path / "dst", 2, method="aligned")
    assert record["details"]["notes"] == []
    again, info = type(model).from_pretrained(tmp_path / "dst", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    given = {"pixel_values": torch.randn(1, 3, 16, 16), "decoder_input_ids": IDS}
    with torch.no_grad():
        got, want = again.eval()(**given), model(**given)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    assert got.past_key_values.self_attention_cache.layers[0].keys.shape[1] == 2


def test_layers_without_keys_of_their_own_are_told() -> None:
    """A model that drafts for another one reads that one's keys and values (Gemma 4's assistant)."""
    raw = json.loads(transformers.Lfm2Config(num_hidden_layers=2).to_json_string(use_diff=False))
    with pytest.raises(ConversionError, match="no layer of this lfm2 makes keys and values"):
        read_config(raw, "config.json").locate(["model.layers.1.self_attn.q_proj.weight"])


@pytest.mark.parametrize(
    ("model_type", "prefix", "query", "path"),
    [  # names as transformers saves these models, and as they are published
        ("molmo2", "model.transformer.blocks.0.self_attn.", "att_proj", ["text_config"]),
        ("nemotron_h_omni", "language_model.backbone.layers.1.mixer.", "q_proj", ["text_config"]),
        ("nemo_speechlm", "llm.model.layers.5.mixer.", "q_proj", ["text_config"]),
        ("qianfan_ocr", "language_model.model.encoder.layers.0.self_attn.", "q_proj", ["text_config"]),
        ("cosmos3_omni", "layers.0.self_attn.", "to_q", ["text_config"]),
        ("cosmos3_edge", "layers.0.self_attn.", "to_q", ["text_config"]),
        ("qwen2_5_omni", "thinker.model.layers.0.self_attn.", "q_proj", ["thinker_config", "text_config"]),
        ("colqwen2", "vlm.model.language_model.layers.0.self_attn.", "q_proj", ["vlm_config", "text_config"]),
    ],
)
def test_where_larger_models_keep_their_language_model(
    model_type: str, prefix: str, query: str, path: list[str]
) -> None:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("unknown to this transformers")
    raw = json.loads(transformers.CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
    model = read_config(raw, "config.json")
    key = prefix + query.replace("q_proj", "k_proj")
    model.locate([f"{prefix}{query}.weight", f"{key}.weight", "visual.blocks.0.attn.qkv.weight"])
    (layers,) = (layers for _, layers in model.stacks)
    assert prefix in [layer.prefix for layer in layers]
    model.write_kv_heads(raw, [replace(layer, new_kv_heads=1) for layer in layers])
    assert part_of(raw, tuple(path))["num_key_value_heads"] == 1


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
