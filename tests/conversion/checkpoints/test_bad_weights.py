"""Weights that a conversion refuses: missing, cut, misshapen, not finite, quantized, pickled, badly indexed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from refusals import K0, change_tensors, convert, run
from safetensors.torch import load_file
from tiny_families import tiny_model


@pytest.mark.parametrize(
    "name", [K0, "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
)
def test_a_missing_tensor(src: Path, name: str) -> None:
    change_tensors(src, lambda tensors: tensors.pop(name))
    convert(src, words=name)


def test_a_missing_bias(src: Path) -> None:
    change_tensors(src, lambda tensors: tensors.pop("model.layers.1.self_attn.v_proj.bias"))
    convert(src, words="model.layers.1.self_attn.v_proj.bias")


def test_truncated_files(src: Path) -> None:
    path = src / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        convert(src, words="truncated")


def test_a_lying_header(src: Path) -> None:
    path = src / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[32,32]', b'"shape":[32,33]', 1))
    convert(src, words="lies about tensor")


@pytest.mark.parametrize(
    "name", [K0, "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
)
def test_a_wrong_shape(src: Path, name: str) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].contiguous()

    change_tensors(src, cut)
    convert(src, words=name)


@pytest.mark.parametrize("name", [K0, "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_weights(src: Path, name: str, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    change_tensors(src, spoil)
    convert(src, words=name)
    result = run("convert", src, src.parent / "dst", "--kv-heads", 2, "--allow-nonfinite")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_nonfinite_weights_in_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model("llama", dtype=dtype).save_pretrained(tmp_path / "src")
    ok = run("convert", tmp_path / "src", tmp_path / "fine", "--kv-heads", 2)
    assert ok.exit_code == 0, ok.stderr
    for sign in (1, -1):

        def spoil(tensors: dict[str, torch.Tensor], value: float = sign * float("nan")) -> None:
            tensors["lm_head.weight"].view(-1)[7] = value

        change_tensors(tmp_path / "src", spoil)
        convert(tmp_path / "src", words="lm_head.weight")


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "missing.safetensors"])
def test_an_index_that_points_elsewhere(sharded: Path, file: str) -> None:
    (sharded.parent / "outside.safetensors").write_bytes(next(sharded.glob("*.safetensors")).read_bytes())
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"][K0] = file
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(sharded, words="missing.safetensors" if file.startswith("missing") else "points outside")


def test_an_index_that_lies(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][K0] = index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    convert(sharded, words=K0)
    path.write_text("{not json")
    convert(sharded, words="not valid JSON")
    path.write_text("{}")
    convert(sharded, words="weight_map")


def test_a_missing_shard(sharded: Path) -> None:
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    convert(sharded, words="which its index names")


def test_quantized_weights(src: Path) -> None:
    def to_int(tensors: dict[str, torch.Tensor]) -> None:
        tensors[K0] = tensors[K0].to(torch.int8)

    def to_gptq(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[K0]
        tensors[K0.replace("weight", "qweight")] = torch.zeros(4, 32, dtype=torch.int32)

    change_tensors(src, to_int)
    convert(src, words="quantized")
    change_tensors(src, to_gptq)
    convert(src, words="quantized")


def test_gguf(src: Path) -> None:
    (src / "config.json").unlink()
    (src / "model-q4.gguf").write_bytes(b"GGUF")
    convert(src, words="--dequantize")
    convert(src / "model-q4.gguf", words="--dequantize")


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_pickles(src: Path) -> None:
    state = load_file(src / "model.safetensors")
    kept = (src / "model.safetensors").read_bytes()
    (src / "model.safetensors").unlink()
    torch.save(state, src / "pytorch_model.bin")
    convert(src, words="--allow-pickle")
    dst = src.parent / "dst"
    result = run("convert", src, dst, "--kv-heads", 2, "--allow-pickle")
    assert result.exit_code == 0, result.stderr
    (src.parent / "again").mkdir()
    shutil.copy(src / "config.json", src.parent / "again")
    (src.parent / "again" / "model.safetensors").write_bytes(kept)
    assert run("convert", src.parent / "again", src.parent / "dst2", "--kv-heads", 2).exit_code == 0
    one, other = load_file(dst / "model.safetensors"), load_file(src.parent / "dst2" / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    shutil.rmtree(dst)
    evil = Evil(src.parent / "was run")
    (src / "pytorch_model.bin").write_bytes(pickle.dumps({K0: evil}))
    convert(src, "--allow-pickle", words="no pickle of plain tensors")
    torch.save({"a": evil}, src / "pytorch_model.bin")
    convert(src, "--allow-pickle", words="no pickle of plain tensors")
    assert not evil.trace.exists()
    torch.save({K0: torch.eye(4).to_sparse()}, src / "pytorch_model.bin")
    convert(src, "--allow-pickle", words="no plain tensor")
    torch.save([1, 2], src / "pytorch_model.bin")
    convert(src, "--allow-pickle", words="dictionary")
    (src / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")
    convert(src, "--allow-pickle", words="no pickle of plain tensors")


def small(kind: str, **more: Any) -> Any:
    """A stock encoder, e.g. of kind ``BertModel``."""
    model_class = getattr(transformers, kind)
    config = model_class.config_class(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50, image_size=16,
        patch_size=8,
    )  # fmt: skip
    return model_class(config, **more)


@pytest.mark.parametrize("kind", ["BertModel", "RobertaModel", "ViTModel"])
def test_a_pooler_that_was_not_saved_is_not_missed(kind: str, tmp_path: Path) -> None:
    """``add_pooling_layer=False`` leaves no trace in config.json."""
    small(kind, add_pooling_layer=False).save_pretrained(tmp_path / "src")
    done = run("convert", tmp_path / "src", tmp_path / "dst", "--kv-heads", 1, "--method", "mean")
    assert done.exit_code == 0, done.output
    names = set(load_file(tmp_path / "dst" / "model.safetensors"))
    assert names == set(load_file(tmp_path / "src" / "model.safetensors")) and not any("pooler" in n for n in names)


def test_a_pooler_that_a_head_reads_is_missed(tmp_path: Path) -> None:
    src = tmp_path / "src"
    small("BertForSequenceClassification").save_pretrained(src)
    change_tensors(src, lambda tensors: tensors.pop("bert.pooler.dense.bias"))
    convert(src, words="bert.pooler.dense.bias")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "model.",
            "module.model.",
            "under 'module.model.': rename them",
        ),
        ("q_proj.", "q_proj.base_layer.", "carries a PEFT adapter: save the model after merge_and_unload()"),
    ],
)
def test_names_that_a_wrapper_left_are_told(old: str, new: str, words: str, src: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    change_tensors(src, rename)
    convert(src, words=words)
