"""Everything a user can get wrong, through the command line: exit code 2, one sentence, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hf_attn_patch.conversion import ConversionError, plan
from hf_attn_patch.conversion.writer import check_space
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_families import tiny_model

from hf_attn_patch.cli import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(folder: Path, *arguments: object, words: str) -> None:
    """The command fails as it should and leaves ``folder`` as it was."""
    before = listing(folder)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert words in lines[0], lines[0]
    assert "Traceback" not in result.stderr
    assert listing(folder) == before


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    model = tiny_model("llama")
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    return folder


@pytest.fixture
def src(sources: Path, tmp_path: Path) -> Path:
    shutil.copytree(sources / "single", tmp_path / "src")
    return tmp_path / "src"


@pytest.fixture
def sharded(sources: Path, tmp_path: Path) -> Path:
    shutil.copytree(sources / "sharded", tmp_path / "src")
    return tmp_path / "src"


def convert(src: Path, *more: object, words: str) -> None:
    refused(src.parent, "convert", src, src.parent / "dst", "--kv-heads", 2, *more, words=words)


def change_config(src: Path, **changes: Any) -> None:
    config = json.loads((src / "config.json").read_text())
    config.update(changes)
    (src / "config.json").write_text(json.dumps(config))


def change_tensors(src: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(src / "model.safetensors")
    change(tensors)
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})


K0 = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("kv_heads", "words"),
    [
        ("3", "cannot be merged evenly"), ("0", "whole number"), ("-2", "whole number"), ("16", "more than the 8"),
        ("two", "no number of heads"), ("2.5", "no number of heads"), ("", "no number of heads"),
        ("2,4", "cannot have 2, 4 KV heads"), ("2,2,2", "one per layer"), ("cross=2", "no attention 'cross'"),
        ("99999999999999999999", "more than"),
    ],
)  # fmt: skip
def test_numbers_of_heads(src: Path, kv_heads: str, words: str) -> None:
    refused(src.parent, "convert", src, src.parent / "dst", "--kv-heads", kv_heads, words=words)


def test_options(src: Path) -> None:
    convert(src, "--method", "median", words="choose one of auto, mean")
    convert(src, "--max-shard-size", "big", words="no size")
    convert(src, "--max-shard-size", "0", words="holds nothing")
    convert(src, "--workers", 0, words="at least 1")
    convert(src, "--revision", "main", words="is a folder")
    refused(src.parent, "convert", src, "--kv-heads", 2, words="no destination")


def test_missing_things(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(src.parent, "convert", src.parent / "nowhere", src.parent / "dst", "--kv-heads", 2, words="is no folder")
    refused(src.parent, "convert", src / "config.json", src.parent / "dst", "--kv-heads", 2, words="not a folder")
    (src / "config.json").rename(src.parent / "config.json")
    convert(src, words="no config.json")
    (src / "adapter_config.json").write_text("{}")
    convert(src, words="adapter")
    (src.parent / "config.json").rename(src / "config.json")
    (src / "model.safetensors").unlink()
    convert(src, words="no weights")


def test_a_hub_id_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(
        tmp_path, "convert", "nobody/no-such-model", tmp_path / "dst", "--kv-heads", 2, words="neither a folder nor"
    )


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


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_that_leave_the_folder(src: Path, name: str) -> None:
    if not (src / name).exists():
        (src / name).write_text("{}")
    (src / name).rename(src.parent / "elsewhere")
    (src / name).symlink_to(src.parent / "elsewhere")
    convert(src, words="leads outside")


def test_links_of_a_hub_cache_are_followed(src: Path) -> None:
    repo = src.parent / "models--org--name"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / "abc"
    src.rename(snapshot)
    (snapshot / "model.safetensors").rename(repo / "blobs" / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    result = run("convert", snapshot, src.parent / "dst", "--kv-heads", 2)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, "nearest supported: 'llama'"),
        ({"model_type": "bert-like"}, "conversion/families.py"),
        ({"model_type": None}, "model_type"),
        ({"model_type": 3}, "model_type"),
        ({"num_attention_heads": 4}, "config.json"),
        ({"num_key_value_heads": 4}, K0),
        ({"num_key_value_heads": 0}, "config.json"),
        ({"num_key_value_heads": 3}, "config.json"),
        ({"num_key_value_heads": 16}, "config.json"),
        ({"num_attention_heads": "8"}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"head_dim": 6}, "shape"),
        ({"hidden_size": 64}, "shape"),
        ({"hidden_size": -32}, "config.json"),
        ({"vocab_size": 65}, "[65, 32]"),
        ({"intermediate_size": 40}, "mlp"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, "says 1 layers"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_key_value_heads": 10**12, "num_attention_heads": 10**12}, "config.json"),
        ({"attention_bias": True, "tie_word_embeddings": "x"}, "config.json"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized checkpoint (gptq)"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "(bitsandbytes); convert the",
        ),
        ({"quantization_config": "x"}, "quantized checkpoint; convert the unquantized one, then quantize that"),
    ],
)
def test_configs_that_disagree(src: Path, changes: dict[str, Any], words: str) -> None:
    change_config(src, **changes)
    convert(src, words=words)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "llama"', "\x00\x01"])
def test_configs_that_are_none(src: Path, text: str) -> None:
    (src / "config.json").write_text(text)
    convert(src, words="config.json")


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
    convert(src, words="safetensors checkpoint they were made from")
    convert(src / "model-q4.gguf", words="safetensors checkpoint that it was made from")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/hf-attn-evil-was-run",)


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
    (src / "pytorch_model.bin").write_bytes(pickle.dumps({K0: Evil()}))
    convert(src, "--allow-pickle", words="no pickle of plain tensors")
    torch.save({"a": Evil()}, src / "pytorch_model.bin")
    convert(src, "--allow-pickle", words="no pickle of plain tensors")
    assert not Path("/tmp/hf-attn-evil-was-run").exists()
    torch.save({K0: torch.eye(4).to_sparse()}, src / "pytorch_model.bin")
    convert(src, "--allow-pickle", words="no plain tensor")
    torch.save([1, 2], src / "pytorch_model.bin")
    convert(src, "--allow-pickle", words="dictionary")
    (src / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")
    convert(src, "--allow-pickle", words="no pickle of plain tensors")


def test_destinations(src: Path) -> None:
    dst = src.parent / "dst"
    refused(src.parent, "convert", src, src, "--kv-heads", 2, words="is the source itself")
    refused(src.parent, "convert", src, src, "--kv-heads", 2, "--overwrite", words="is the source itself")
    refused(src.parent, "convert", src, src / "inner", "--kv-heads", 2, words="in one another")
    refused(src.parent, "convert", src, src.parent, "--kv-heads", 2, "--overwrite", words="in one another")
    (src.parent / "link").symlink_to(src)
    refused(src.parent, "convert", src, src.parent / "link", "--kv-heads", 2, "--overwrite", words="source itself")
    dst.write_text("a file")
    convert(src, "--overwrite", words="not a folder")
    dst.unlink()
    dst.mkdir()
    (dst / "thesis.txt").write_text("mine")
    convert(src, words="--overwrite")
    convert(src, "--overwrite", words="holds no checkpoint")
    (dst / "config.json").write_text("{}")
    convert(src, words="--overwrite")
    result = run("convert", src, dst, "--kv-heads", 2, "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert not (dst / "thesis.txt").exists()
    assert sorted(p.name for p in src.parent.iterdir()) == ["dst", "link", "src"]


def test_a_full_disk_says_so_before_it_starts(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(src)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    convert(src, words="1.0 kB free")
    with pytest.raises(ConversionError, match=r"needs 10\.0 MB"):
        check_space(src, 10_000_000)


def test_a_disk_that_fills_up_meanwhile(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    convert(src, words="is full")


values = st.one_of(
    st.none(), st.booleans(), st.integers(-4, 70), st.integers(), st.floats(), st.text(max_size=4),
    st.lists(st.integers(0, 9), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
KEYS = [
    "model_type", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "num_hidden_layers",
    "architectures", "text_config", "rope_parameters", "quantization_config", "auto_map", "vocab_size", "dtype",
]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=3))
def test_any_config_is_planned_or_refused(src: Path, changes: dict[str, Any]) -> None:
    original = (src / "config.json").read_text()
    try:
        change_config(src, **changes)
        plan(src, 2)
    except ConversionError as error:
        assert "\n" not in str(error)  # noqa: PT017
    finally:
        (src / "config.json").write_text(original)
