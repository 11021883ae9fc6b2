"""What a stranger wrote into files costs a sentence, not time or memory."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from refusals import change_config, convert, listing, refused, run

from hf_attn_patch.conversion import ConversionError
from hf_attn_patch.conversion.checkpoints.safetensors_header import parse_header
from hf_attn_patch.documents.stranger_json import MAX_CONTAINERS, check_config_limits, parse_json_object


def header_of(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


BOMBS = {
    "a shape of many large numbers": b'{"a":{"dtype":"F32","shape":['
    + b",".join([b"4611686018427387904"] * 300_000)
    + b'],"data_offsets":[0,0]}}',
    "many empty lists": b'{"a":[' + b",".join([b"[]"] * 5_000_000) + b"]}",
    "deep": b'{"a":' + b"[" * 900_000 + b"]" * 900_000 + b"}",
    "long numbers": b'{"a":{"dtype":"F32","shape":[' + b"9" * 4_000_000 + b'],"data_offsets":[0,0]}}',
}
MEASURE = """
import resource, sys, time
from hf_attn_patch.conversion.checkpoints.safetensors_header import read_header
from hf_attn_patch.conversion import ConversionError
before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    read_header(sys.argv[1], "bomb")
except ConversionError as error:
    assert len(str(error)) < 1000, len(str(error))
    print(time.process_time() - begun, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("bomb", BOMBS)
def test_header_bombs(bomb: str, tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(header_of(BOMBS[bomb]))
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "bomb")], capture_output=True, text=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 5 and megabytes < 500


@pytest.mark.parametrize(
    "change",
    [
        {"num_labels": 10**9}, {"num_hidden_layers": 10**9}, {"decoder_layers": 10**8}, {"num_local_experts": 10**7},
        {"layer_types": ["full_attention"] * 300_000}, {"attention_types": [[["global"], 10**9]]},
        {"depths": [2, 10**8]}, {"text_config": {"num_hidden_layers": 10**7}},
        {"vision_config": {"num_labels": 10**10}},
    ],
    ids=str,
)  # fmt: skip
def test_config_bombs(change: dict[str, object], src: Path) -> None:
    change_config(src, **change)
    begun = time.process_time()
    refused(src.parent, "convert", src, src.parent / "dst", "--kv-heads", 2, words="config")
    assert time.process_time() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20  # kB


@pytest.mark.parametrize(
    "change", [{"vocab_size": 20_000_000}, {"intermediate_size": 2**27}, {"num_hidden_layers": 900}]
)
@pytest.mark.parametrize("reader", ["evaluate", "train", "load"])
def test_config_bombs_where_models_are_loaded(reader: str, change: dict[str, int], tmp_path: Path) -> None:
    """transformers makes what a checkpoint lacks, in full and at random, before it tells that it was lacking."""
    from tiny import save_tiny, tiny_llama

    from hf_attn_patch import HFAttnError
    from hf_attn_patch.conversion.loading import from_pretrained
    from hf_attn_patch.training.models import load_config, load_model

    src = Path(save_tiny(tmp_path / "src", tiny_llama(4)))
    change_config(src, **change)
    (tmp_path / "text.txt").write_text("some text\n" * 40)
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    readers = {
        "train": lambda: load_model(str(src), load_config(str(src)), "causal", attention="eager", dtype=torch.float32),
        "load": lambda: from_pretrained(transformers.AutoModelForCausalLM, src, num_key_value_heads=2),
    }
    if reader == "evaluate":
        refused(tmp_path, "evaluate", src, "--text", tmp_path / "text.txt", words="config.json asks for")
    else:
        with pytest.raises(HFAttnError, match=r"config.json asks for|asks for \[|config.json says|though config.json"):
            readers[reader]()
    assert time.process_time() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10  # kB


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize(
    "name", ["kernels-community/flash-attn", "evil/kernel", {"": "evil/kernel"}, "flash_attention_2"]
)
def test_a_config_chooses_no_kernel(key: str, name: object, tmp_path: Path) -> None:
    """transformers would fetch it and run its code, or refuse a machine without FlashAttention."""
    from tiny import save_tiny, tiny_llama

    from hf_attn_patch.training.models import load_config, load_model

    src = Path(save_tiny(tmp_path / "src", tiny_llama(4)))
    change_config(src, **{key: name})
    (tmp_path / "text.txt").write_text("some text\n" * 40)
    for command in (
        ("convert", src, tmp_path / "dst", "--kv-heads", 2, "--method", "mean", "-q"),
        ("evaluate", src, "--text", tmp_path / "text.txt", "--tokens", 20, "--no-speed"),
    ):
        done = run(*command)
        assert done.exit_code == 0, done.output
    load_model(str(src), load_config(str(src)), "causal", attention="sdpa", dtype=torch.float32)


def test_real_configs_are_believed() -> None:
    """The largest numbers of public models: 126 layers, 384 experts, 21,843 labels, 48 blocks in a stage, buckets."""
    config = {"num_hidden_layers": 126, "n_routed_experts": 384, "num_labels": 21_843, "depths": [3, 4, 48, 3]}
    config |= {"num_hash_functions": 8, "num_hash_buckets": 16_384}  # CANINE
    check_config_limits({**config, "vocab_size": 262_144, "max_position_embeddings": 10_485_760}, "config.json")


@pytest.mark.parametrize("where", ["key", "value", "deep"])
def test_lone_surrogates_are_refused_at_the_start(where: str, src: Path) -> None:
    raw = (src / "config.json").read_text().rstrip()[:-1]
    more = {"key": r'"a\ud800": 1', "value": r'"a": "x\udfff"', "deep": r'"a": [{"b": ["\uD834x"]}]'}[where]
    (src / "config.json").write_text(f"{raw}, {more}}}")
    convert(src, words="half a character")


def test_pairs_of_surrogates_are_characters() -> None:
    assert parse_json_object(rb'{"a": "\ud834\udd1e \\ud800"}', "x") == {"a": "\U0001d11e \\ud800"}


def test_a_pickle_whose_strides_repeat_is_refused(src: Path) -> None:
    (src / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1).expand(10_000_000_000)}, src / "pytorch_model.bin")
    convert(src, "--allow-pickle", words="more than the file holds of it")


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    from tiny_families import tiny_model

    folder = tmp_path_factory.mktemp("pickled")
    model = tiny_model("llama")
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder, (folder / "pytorch_model.bin").read_bytes()


@given(data=st.data())
def test_mutated_pickles(data: st.DataObject, pickled: tuple[Path, bytes]) -> None:
    folder, whole = pickled
    spoilt = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 12))):
        spoilt[data.draw(st.integers(0, min(len(spoilt) - 1, 6000)))] = data.draw(st.integers(0, 255))
    (folder / "pytorch_model.bin").write_bytes(bytes(spoilt))
    done = CliRunner().invoke(
        __import__("hf_attn_patch.cli", fromlist=["main"]).main,
        ["convert", str(folder), "--kv-heads", "1", "--dry-run", "--allow-pickle"],
    )
    assert done.exit_code in (0, 2) and isinstance(done.exception, SystemExit | None), done.exception


@given(raw=st.binary(max_size=200))
def test_headers_of_anything(raw: bytes) -> None:
    with pytest.raises(ConversionError) as caught:
        parse_header(header_of(b"[" + raw), 9 + len(raw), "x")  # no object, whatever follows
    assert len(str(caught.value)) < 1000


def test_the_bound_on_containers_is_far_from_real_files() -> None:
    text = ",".join(f'"{i}":{{"dtype":"F32","shape":[1,1],"data_offsets":[0,0]}}' for i in range(100_000))
    assert text.count("[") + text.count("{") < MAX_CONTAINERS / 3


def test_a_stock_index_may_name_a_tied_head_that_is_stored_nowhere(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    change_config(sharded, tie_word_embeddings=True)
    before = listing(sharded)
    name = next(iter(index["weight_map"].values()))
    if "lm_head.weight" not in index["weight_map"]:
        index["weight_map"]["lm_head.weight"] = name
        (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
        assert run("convert", sharded, sharded.parent / "dst", "--kv-heads", 2, "-q").exit_code == 0
    assert before


def test_a_tokenizers_own_code_is_not_dropped_without_a_word(src: Path) -> None:
    (src / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tok.Own", None]}}))
    done = run("convert", src, src.parent / "dst", "--kv-heads", 2, "--method", "mean")
    assert done.exit_code == 0 and "tokenizer has code of its own" in done.stderr
    (src / "tokenizer_config.json").write_text("[")  # not what decides a conversion
    assert run("convert", src, src.parent / "other", "--kv-heads", 2, "--method", "mean", "-q").exit_code == 0


def rewrite(src: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(src / "model.safetensors")
    change(tensors)
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "shape"), [("masked_bias", ()), ("bias", (1, 1, 4, 4)), ("rotary_emb.inv_freq", (2,))], ids=str
)
def test_a_masks_buffer_is_no_damaged_weight(name: str, shape: tuple[int, ...], src: Path) -> None:
    """Old files hold such buffers (GPT-NeoX's masked_bias is -inf in fp16), and no stock class loads them."""
    rewrite(src, lambda tensors: tensors.update({f"model.layers.0.self_attn.{name}": torch.full(shape, -torch.inf)}))
    done = run("convert", src, src.parent / "dst", "--kv-heads", 2, "--method", "mean", "-q")
    assert done.exit_code == 0, done.output


def test_nonfinite_heads_cannot_be_factored_and_the_way_out_is_named(src: Path) -> None:
    rewrite(src, lambda tensors: tensors["model.layers.0.self_attn.k_proj.weight"].fill_(torch.nan))
    done = run("convert", src, src.parent / "dst", "--kv-heads", 2, "--method", "aligned", "--allow-nonfinite", "-q")
    assert isinstance(done.exception, SystemExit | None), done.exception
    assert done.exit_code == 0 or "--method mean" in done.stderr


def test_verifying_another_models_conversion_says_what_differs(src: Path, tmp_path: Path) -> None:
    from tiny import save_tiny, tiny_llama

    other = save_tiny(tmp_path / "other", tiny_llama(2))
    assert run("convert", src, src.parent / "dst", "--kv-heads", 4, "--method", "mean", "-q").exit_code == 0
    done = run("verify", other, src.parent / "dst")
    assert done.exit_code == 1 and "is NOT the conversion" in done.stdout, done.output
