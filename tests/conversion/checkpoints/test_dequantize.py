"""Quantized checkpoints unpacked: against numbers that are unpacked here, by the formats' own definitions."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import tensors
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_attn_patch.cli import main
from hf_attn_patch.conversion import ConversionError, convert, dequantize, inspect_source

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
IDS = torch.tensor([[5, 9, 33, 2, 17, 60, 41]])


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def fp8_checkpoint(folder: Path) -> dict[str, Tensor]:
    """A Llama in FP8 with a scale for each block of 32 x 32, as DeepSeek's are; gives what it means."""
    model = llama()
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    meant, stored = dict(state), dict(state)
    for name, weight in state.items():
        if "_proj." not in name:
            continue
        rows, columns = (n // 32 for n in weight.shape)
        blocks = weight.reshape(rows, 32, columns, 32)
        scale = blocks.abs().amax((1, 3)) / 448
        packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name] = packed.reshape(weight.shape).contiguous()
        stored[f"{name}_scale_inv"] = scale
        meant[name] = (packed.float() * scale[:, None, :, None]).reshape(weight.shape)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    say(folder, quant_method="fp8", weight_block_size=[32, 32], activation_scheme="dynamic")
    return meant


def say(folder: Path, **quantization: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))


def test_fp8_becomes_what_its_blocks_say(tmp_path: Path) -> None:
    meant = fp8_checkpoint(tmp_path / "src")
    dequantize(tmp_path / "src", tmp_path / "plain")
    got = tensors(tmp_path / "plain")
    assert got.keys() == meant.keys()
    for name, tensor in meant.items():
        torch.testing.assert_close(got[name].float(), tensor, rtol=2**-8, atol=1e-6)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert model(IDS).logits.isfinite().all()


def test_what_a_format_leaves_beside_its_unpacked_weights_is_not_written(tmp_path: Path) -> None:
    """As compressed-tensors under transformers up to 5.20: scales and shapes stay."""
    from hf_attn_patch.conversion.unpacking import _write

    model = llama()
    meant = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    projection = model.model.layers[1].self_attn.v_proj
    projection.weight_scale = torch.nn.Parameter(torch.ones(32, 1))
    projection.weight_shape = torch.nn.Parameter(torch.tensor([32, 64]), requires_grad=False)
    _write(model, tmp_path)
    got = tensors(tmp_path)
    assert got.keys() == meant.keys() and all(torch.equal(got[name], meant[name]) for name in meant)


def test_the_command_unpacks_beside_the_result_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meant = fp8_checkpoint(tmp_path / "src")
    call = ["convert", str(tmp_path / "src"), str(tmp_path / "dst"), "--kv-heads", "2", "--method", "mean", "-q"]
    refused = CliRunner().invoke(main, call)
    assert refused.exit_code == 2
    assert "--dequantize" in refused.output
    for name in ("left", "held"):  # by a killed run; by one that is at work
        (tmp_path / f".dst.plain-{name}").mkdir()
    held = os.open(tmp_path / ".dst.plain-held", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    done = CliRunner().invoke(main, [*call, "--dequantize"])
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == [".dst.plain-held", "dst", "src"]
    os.close(held)
    name = "model.layers.1.self_attn.v_proj.weight"
    pooled = meant[name].unflatten(0, (2, 2, 8)).mean(1).flatten(0, 1)
    torch.testing.assert_close(tensors(tmp_path / "dst")[name].float(), pooled, rtol=2**-6, atol=1e-4)
    assert json.loads((tmp_path / "dst" / "conversion.json").read_text())["source"]["name"] == str(tmp_path / "src")
    assert CliRunner().invoke(main, ["verify", *call[1:3], "--dequantize"]).exit_code == 0
    dry = CliRunner().invoke(main, [*call[:2], "--kv-heads", "2", "--method", "mean", "--dequantize", "--dry-run"])
    assert dry.exit_code == 0, dry.output

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_attn_patch.conversion.api.plan", interrupted)
    stopped = CliRunner().invoke(main, [*call, "--dequantize", "--overwrite"])
    assert (stopped.exit_code, stopped.output) == (130, "Interrupted; what was unpacked is removed: begin anew.\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


#: the sixteen numbers of FP4 (E2M1), by their bits
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4 += [-x for x in FP4]


def test_mxfp4_experts(tmp_path: Path) -> None:
    """GPT-OSS as it is published: the experts in FP4 with a power of two for each 32 of them."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 32, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, head_dim=8)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "src")
    state = load_file(tmp_path / "src" / "model.safetensors")
    meant = dict(state)
    for name in [n for n in state if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = state.pop(name).shape
        nibbles = torch.randint(0, 16, (experts, outputs, inputs // 32, 32))
        exponents = torch.randint(-4, 3, (experts, outputs, inputs // 32))
        state[f"{name}_blocks"] = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).to(torch.uint8)
        state[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
        values = torch.tensor(FP4)[nibbles] * (2.0 ** exponents[..., None])
        meant[name] = values.flatten(2).transpose(1, 2)
    save_file(state, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    say(tmp_path / "src", quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
    convert(tmp_path / "src", tmp_path / "dst", 2, method="mean", dequantize=True)
    got = tensors(tmp_path / "dst")
    assert got.keys() == meant.keys()
    for name, tensor in meant.items():
        if "k_proj" not in name and "v_proj" not in name:
            assert torch.equal(got[name].float(), tensor.float()), name
    assert inspect_source(tmp_path / "dst")["attention"][0]["kv_heads"] == 2


def gguf_file(path: Path, scores: bool = True) -> tuple[dict[str, Tensor], Any]:
    """A Llama as llama.cpp would write it, in Q8_0: 32 numbers share a scale in fp16."""
    gguf = pytest.importorskip("gguf")
    model, config = llama(), transformers.LlamaConfig(**SIZES)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(8)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    words = [chr(0x100 + i) if i < 33 else chr(i + 30) for i in range(64)]
    writer.add_token_list(words)
    if scores:
        writer.add_token_scores([0.0] * 64)
    writer.add_token_types([1] * 64)
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    meant: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        value = tensor.float()
        if value.dim() > 1:
            blocks = value.reshape(-1, 32)
            scale = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
            value = ((blocks / scale).round() * scale).reshape(value.shape)
        meant[name] = value
        heads = {"q_proj": 8, "k_proj": 4}.get(name.split(".")[-2])
        if heads:  # llama.cpp's RoPE pairs neighbours: rows i and i + D / 2 stand side by side
            value = value.reshape(heads, 2, 4, 64).transpose(1, 2).reshape(value.shape)
        where = names.get_name(name, try_suffixes=(".weight",))
        if value.dim() > 1:
            packed = gguf.quantize(np.ascontiguousarray(value.numpy()), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(where, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(where, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant, model


def test_a_gguf_file(tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    meant, _ = gguf_file(folder / "tiny.Q8_0.gguf")
    with pytest.raises(ConversionError, match="--dequantize"):
        convert(folder / "tiny.Q8_0.gguf", tmp_path / "dst", 2, method="mean")
    convert(folder / "tiny.Q8_0.gguf", tmp_path / "dst", 2, method="mean", dequantize=True)
    got = tensors(tmp_path / "dst")
    assert got.keys() == meant.keys()
    for name, tensor in meant.items():
        pooled = tensor
        if "k_proj" in name or "v_proj" in name:
            pooled = tensor.bfloat16().float().unflatten(0, (2, 2, 8)).mean(1).flatten(0, 1)
        torch.testing.assert_close(got[name].float(), pooled, rtol=2**-7, atol=2**-9 * float(tensor.abs().max()))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "dst").vocab_size == 64
    convert(folder, tmp_path / "again", 2, method="mean", dequantize=True)  # the folder has one such file
    assert all(torch.equal(tensors(tmp_path / "again")[name], got[name]) for name in got)


def test_a_tokenizer_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    gguf_file(tmp_path / "gguf" / "tiny.gguf", scores=False)
    with pytest.warns(UserWarning, match="cannot read its tokenizer"):
        dequantize(tmp_path / "gguf" / "tiny.gguf", tmp_path / "plain")
    assert transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (None, "leave --dequantize out"),
        ({"quant_method": "gptq", "bits": 4}, "cannot unpack that on a CPU .*GGUF, fp8"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "cannot be unpacked here|no valid"),
        ({"quant_method": ["fp8"]}, "cannot unpack that"),
        ("fp8", "does not say how"),
    ],
)
def test_what_cannot_be_unpacked_is_one_sentence(quantization: Any, words: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "src")
    if quantization is not None:
        path = tmp_path / "src" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    with pytest.raises(ConversionError, match=words):
        convert(tmp_path / "src", tmp_path / "dst", 2, method="mean", dequantize=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_a_damaged_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(ConversionError, match="cannot be unpacked here"):
        dequantize(tmp_path / "a.gguf", tmp_path / "out")


def test_files_that_are_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    (tmp_path / "b.gguf").write_bytes(b"none")
    with pytest.raises(ConversionError, match="is no GGUF file"):
        dequantize(tmp_path / "b.gguf", tmp_path / "out")
    with pytest.raises(ConversionError, match="2 GGUF files"):
        dequantize(tmp_path, tmp_path / "out")
