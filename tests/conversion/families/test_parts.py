"""Models whose attentions are described by configs inside their own: T5Gemma's two Gemmas, CSM's two decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import tensors
from shared_heads import share_heads

from hf_attn_patch.conversion import ConversionError, convert, inspect_source, plan

IDS = torch.tensor([[5, 9, 33, 2, 17, 60, 41]])
GEMMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 4, "sliding_window": 8, "query_pre_attn_scalar": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
#: of another width than the decoder
NARROW = {**GEMMA, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4}
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 8, "num_codebooks": 4, "max_position_embeddings": 64,
}  # fmt: skip
MIMI = {
    "model_type": "mimi", "hidden_size": 16, "num_filters": 4, "num_residual_layers": 1, "upsampling_ratios": [2, 2],
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16,
    "codebook_size": 16, "codebook_dim": 8, "num_quantizers": 4, "vector_quantization_hidden_dimension": 8,
    "upsample_groups": 16,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "t5gemma": (
        "T5GemmaForConditionalGeneration",
        {"encoder": NARROW, "decoder": GEMMA, "vocab_size": 64},
        {"encoder": 1, "decoder": 2, "cross": 2},
    ),
    "t5gemma2": (
        "T5Gemma2ForConditionalGeneration",
        {"encoder": {"text_config": GEMMA, "vision_config": VISION}, "decoder": GEMMA},
        {"encoder": 2, "decoder": 2},
    ),
    "csm": (
        "CsmForConditionalGeneration",
        {
            **LLAMA, "text_vocab_size": 64, "codec_config": MIMI, "depth_decoder_config":
            {**LLAMA, "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 6, "backbone_hidden_size": 32,
             "max_position_embeddings": 5},
        },
        {"self": 2, "depth": 3},
    ),
}  # fmt: skip


def saved(model_type: str, folder: Path) -> Any:
    """A model of that family in ``folder``; returns its class."""
    name, arguments, _ = CASES[model_type]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(transformers.CONFIG_MAPPING[model_type](**arguments))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.2)
    model.save_pretrained(folder)
    return model_class


def said(model_class: Any, folder: Path) -> list[torch.Tensor]:
    """What all of a checkpoint's decoders say."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return [model.eval()(input_ids=IDS, decoder_input_ids=IDS[:, :4], use_cache=False).logits]
        frame = {"input_ids": IDS[:, :4] % 16, "backbone_last_hidden_state": torch.ones(1, 32)}
        return [model.eval()(IDS, use_cache=False).logits, model.depth_decoder(**frame, use_cache=False).logits]


@pytest.mark.parametrize("model_type", CASES)
def test_heads_that_are_one_in_several_bases(model_type: str, tmp_path: Path) -> None:
    model_class, numbers = saved(model_type, tmp_path / "src"), CASES[model_type][2]
    made = plan(tmp_path / "src", numbers, method="aligned")
    share_heads(made, tmp_path / "src", 0, keys=model_type != "t5gemma2")  # which has a norm on keys
    record = convert(tmp_path / "src", tmp_path / "dst", numbers, method="aligned")
    assert not [note for note in record["details"]["notes"] if "weights alone" in note]  # all parts were run
    for after, before in zip(said(model_class, tmp_path / "dst"), said(model_class, tmp_path / "src"), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    convert(tmp_path / "src", tmp_path / "mean", numbers, method="mean")
    for mean, before in zip(said(model_class, tmp_path / "mean"), said(model_class, tmp_path / "src"), strict=True):
        assert float((mean - before).norm() / before.norm()) > 0.01  # what is said would show a loss
    old, new = tensors(tmp_path / "src"), tensors(tmp_path / "dst")
    changed = {name for name in old if old[name].shape != new[name].shape}
    assert len(changed) == 2 * 2 * len(numbers)  # K and V of two layers
    assert all("_attn." in name and "vision" not in name and "codec" not in name for name in changed)


def test_one_number_is_for_what_is_cached(tmp_path: Path) -> None:
    saved("csm", tmp_path / "csm")
    assert [layer.new_kv_heads for layer in plan(tmp_path / "csm", 4).layers] == [4, 4, 6, 6]  # gone with each frame
    assert inspect_source(tmp_path / "csm", 64)["kv_bytes_per_token"] == 2 * 2 * 8 * 4 * 4
    with pytest.raises(ConversionError, match=r"text and codes of sound.*--method aligned"):
        convert(tmp_path / "csm", tmp_path / "dst", 4, method="auto", calibrate="own")
    saved("t5gemma", tmp_path / "t5gemma")
    assert [layer.new_kv_heads for layer in plan(tmp_path / "t5gemma", 2).layers] == [4, 4, 2, 2, 2, 2]
    with pytest.raises(ConversionError, match="one num_key_value_heads for decoder and cross: give them the same"):
        plan(tmp_path / "t5gemma", {"decoder": 2})


@pytest.mark.parametrize("model_type", ["t5gemma", "t5gemma2"])
def test_layers_one_after_the_other_are_the_model(model_type: str, tmp_path: Path) -> None:
    """What the original loses on its own answers is the same by its own forward and by the layers of both towers."""
    saved(model_type, tmp_path / "src")
    numbers: dict[str, Any] = CASES[model_type][2]
    some: dict[str, Any] = {"calibration_tokens": 400, "calibration_length": 16, "method": "auto"}
    share_heads(plan(tmp_path / "src", numbers, method="aligned"), tmp_path / "src", 0, keys=model_type == "t5gemma")
    lost = [
        convert(tmp_path / "src", tmp_path / name, heads, **some)["details"]["held_out"]
        for name, heads in (("decoder", {n: k for n, k in numbers.items() if n != "encoder"}), ("all", numbers))
    ]
    assert lost[0]["loss_before"] == pytest.approx(lost[1]["loss_before"], rel=1e-5)
    for part in lost:
        assert part["loss_after"] == pytest.approx(part["loss_before"], rel=1e-4) and abs(part["kl"]) < 1e-4
