"""from_pretrained(..., num_key_value_heads=N): a conversion on the way into memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import same
from tiny_families import tiny_model

from hf_attn_patch.conversion import ConversionError, convert, from_pretrained, plan

IDS = torch.tensor([[5, 9, 33, 2, 17, 60, 41]])


@pytest.mark.parametrize("model_type", ["llama", "phi3", "stablelm", "falcon"])
def test_conversion_while_loading_equals_conversion_on_disk(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "src", max_shard_size="20KB")
    convert(tmp_path / "src", tmp_path / "dst", kv_heads=2)
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    loaded = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "src", num_key_value_heads=2)
    assert type(loaded) is type(written)
    state = written.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(IDS).logits, written(IDS).logits)
    loaded.save_pretrained(tmp_path / "saved")
    same(tmp_path / "saved", tmp_path / "dst")


def test_no_file_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint that is here: a class of config may name further files, which its owner has or has not."""
    from transformers import modeling_utils

    asked: list[bool] = []

    def cached_file(*_: object, local_files_only: bool = False, **__: object) -> None:
        asked.append(local_files_only)

    tiny_model("llama").save_pretrained(tmp_path / "src")
    monkeypatch.setattr(transformers.LlamaConfig, "extra_files", ("head.safetensors",), raising=False)
    monkeypatch.setattr(modeling_utils, "cached_file", cached_file)
    assert plan(tmp_path / "src", 2).units
    from_pretrained(transformers.LlamaForCausalLM, tmp_path / "src", num_key_value_heads=2)
    assert all(asked)


def test_conversion_while_loading_takes_the_usual_arguments(tmp_path: Path) -> None:
    src = tmp_path / "src"
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(src)
    model, info = from_pretrained(
        transformers.LlamaForCausalLM, src, num_key_value_heads=4, method="first", dtype=torch.float32,
        attn_implementation="eager", output_loading_info=True,
    )  # fmt: skip
    assert not info["missing_keys"]
    assert model.dtype == torch.float32
    assert model.config.num_key_value_heads == 4
    assert model.config._attn_implementation == "eager"
    assert model.generation_config.bos_token_id == 1
    with pytest.raises(ConversionError, match="evenly"):
        from_pretrained(transformers.LlamaForCausalLM, src, num_key_value_heads=3)


def test_a_stock_class_cannot_load_a_grouped_gpt2(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "src")
    model = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "src", num_key_value_heads=2)
    assert model(IDS, use_cache=True).past_key_values.layers[0].keys.shape[1] == 2
    with pytest.raises(ConversionError, match="pass an Auto class"):
        from_pretrained(transformers.GPT2LMHeadModel, tmp_path / "src", num_key_value_heads=2)
