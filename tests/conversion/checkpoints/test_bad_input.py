"""Options, paths and configs that a conversion refuses, through the command line."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import K0, change_config, convert, refused, run

from hf_attn_patch.conversion import ConversionError, plan
from hf_attn_patch.conversion.checkpoints.writer import check_space


@pytest.mark.parametrize(
    ("kv_heads", "words"),
    [
        ("3", "cannot be merged evenly"), ("0", "whole number"), ("-2", "whole number"), ("16", "more than the 8"),
        ("two", "no number of heads"), ("2.5", "no number of heads"), ("", "is empty"),
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


def test_missing_things(src: Path) -> None:
    refused(src.parent, "convert", src.parent / "nowhere", src.parent / "dst", "--kv-heads", 2, words="is no folder")
    refused(src.parent, "convert", src / "config.json", src.parent / "dst", "--kv-heads", 2, words="not a folder")
    (src / "config.json").rename(src.parent / "config.json")
    convert(src, words="no config.json")
    (src / "adapter_config.json").write_text("{}")
    convert(src, words="adapter")
    (src.parent / "config.json").rename(src / "config.json")
    (src / "model.safetensors").unlink()
    convert(src, words="holds an adapter, not a model")
    (src / "adapter_config.json").unlink()
    convert(src, words="no weights")


def test_a_hub_id_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(
        tmp_path, "convert", "nobody/no-such-model", tmp_path / "dst", "--kv-heads", 2, words="neither a folder nor"
    )


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
        ({"model_type": "bert-like"}, "conversion/families/table.py"),
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


def test_the_model_of_an_old_sentence_transformers_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / "0_Transformer" / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match="its model lies in 0_Transformer"):
        plan(tmp_path, 2)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "llama"', "\x00\x01"])
def test_configs_that_are_none(src: Path, text: str) -> None:
    (src / "config.json").write_text(text)
    convert(src, words="config.json")


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
    assert (dst / "thesis.txt").read_text() == "mine"
    assert sorted(p.name for p in src.parent.iterdir()) == ["dst", "link", "src"]


def test_a_full_disk_says_so_before_it_starts(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(src)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    convert(src, words="1.0 kB free")
    with pytest.raises(ConversionError, match=r"needs 10\.0 MB"):
        check_space(src, 10_000_000)


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "is full"), (errno.EFBIG, "--max-shard-size")])
def test_a_disk_that_fills_up_meanwhile(number: int, words: str, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", full)
    convert(src, words=words)


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
