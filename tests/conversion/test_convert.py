"""The command line as a user meets it, and the invariants of a conversion as a whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import same, tensors
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import tiny_model

from hf_attn_patch.cli import main
from hf_attn_patch.conversion import convert, inspect_source, plan, verify
from hf_attn_patch.conversion.checkpoints.hub import resolve

IDS = torch.tensor([[5, 9, 33, 2, 17, 60, 41]])


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "src"
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "bpe.codes").write_text("a b 1")  # PhoBERT's merges
    for name in ("params.json", "hf_quant_config.json"):  # what the source's weights are, in another's words
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text('{"in_features": 32}')
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"not read")  # LaBSE's
    (folder / ".git").mkdir()
    (folder / "training_args.bin").write_bytes(b"x")
    return folder


def test_a_conversion_from_end_to_end(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    result = run("convert", src, dst, "--kv-heads", 2)
    assert "256" not in result.stdout
    lost, warned = result.stderr.strip().splitlines()  # random weights: mean-pooling loses much
    assert lost.startswith("loss on") and warned.startswith("Warning")
    assert (dst / "1_Pooling" / "config.json").read_text() == "{}"
    names = {p.name for p in dst.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "conversion.json", "README.md", "tokenizer.json",
        "chat_template.jinja", "bpe.codes", "1_Pooling", "2_Dense",
    }  # fmt: skip
    assert (dst / "2_Dense" / "pytorch_model.bin").read_bytes() == b"not read"
    before, after = json.loads((src / "config.json").read_text()), json.loads((dst / "config.json").read_text())
    assert after == {**before, "num_key_value_heads": 2}
    record = json.loads((dst / "conversion.json").read_text())
    assert record["method"] == "mean"
    assert record["attention"] == [
        {"attention": "self", "layers": 2, "heads": 8, "head_dim": 4, "kv_heads_before": 8, "kv_heads_after": 2}
    ]
    card = (dst / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "| self | 2 | 8 | 8 | 2 |" in card
    # 2 tensors x 2 layers x 8 (2) heads x 4 numbers x 2 bytes
    assert "256 B before, 64 B now" in card
    assert run("verify", src, dst).stdout.strip().endswith("merged)")


def test_the_card_is_one_that_the_hub_reads(src: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    convert(src, tmp_path / "dst", kv_heads=4)
    data = ModelCard.load(tmp_path / "dst" / "README.md").data
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert "gqa" in data.tags


@pytest.mark.parametrize(
    "text",
    [
        "---\n{a: [}\n---\n",
        "---\n- 1\n---\nx",
        "---\nlicense: {a: 1}\nlanguage: 3\n---\n",
        "",
        "---\n",
        "\x00",
        "no metadata",
    ],
)
def test_any_card_of_the_source_will_do(text: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "src")
    (tmp_path / "src" / "README.md").write_text(text)
    convert(tmp_path / "src", tmp_path / "dst", kv_heads=2, check_load=False)
    assert "license" not in (tmp_path / "dst" / "README.md").read_text()


def test_dry_run_counts_right_and_writes_nothing(src: Path, tmp_path: Path) -> None:
    facts = json.loads(run("convert", src, tmp_path / "dst", "--kv-heads", 2, "--dry-run", "--json").stdout)
    assert list(tmp_path.iterdir()) == []
    assert facts["kv_bytes_per_token"] == {"before": 256, "after": 64}
    # K and V of 2 layers lose 6 of 8 heads of 4 rows, each of 32 columns and a bias, in bf16
    assert facts["bytes"]["before"] - facts["bytes"]["after"] == 2 * 2 * 6 * 4 * (32 + 1) * 2
    assert facts["tensors"]["changed"] == 8
    convert(src, tmp_path / "dst", kv_heads=2)
    weights = (tmp_path / "dst" / "model.safetensors").stat().st_size
    assert 0 <= weights - facts["bytes"]["after"] < 10_000  # the header
    text = run("convert", src, "--kv-heads", 2, "--dry-run").stdout
    assert "256 B -> 64 B per token (25.0%)" in text


def test_a_dry_run_reads_no_weights(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*args: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("hf_attn_patch.conversion.checkpoints.reader.Source.read", no)
    monkeypatch.setattr(os, "preadv", no)
    run("convert", src, tmp_path / "dst", "--kv-heads", 2, "--dry-run")


def test_quiet_and_verbose(src: Path, tmp_path: Path) -> None:
    quiet = run("convert", src, tmp_path / "a", "--kv-heads", 2, "-q")
    assert quiet.output == ""
    verbose = run("convert", src, tmp_path / "b", "--kv-heads", 2, "-v")
    assert "memory needed" in verbose.stderr


def test_all_heads_is_the_identity_bit_by_bit(src: Path, tmp_path: Path) -> None:
    """Invariant 1, for every method."""
    for method in ("mean", "first", "random", "mean-norm"):
        result = run("convert", src, tmp_path / method, "--kv-heads", 8, "--method", method)
        assert "copied as they are" in result.stderr
        same(src, tmp_path / method)


def test_a_uniform_list_is_a_number(src: Path, tmp_path: Path) -> None:
    run("convert", src, tmp_path / "list", "--kv-heads", "2,2")
    run("convert", src, tmp_path / "number", "--kv-heads", 2)
    run("convert", src, tmp_path / "named", "--kv-heads", "self=2")
    same(tmp_path / "list", tmp_path / "number")
    same(tmp_path / "named", tmp_path / "number")
    assert json.loads((tmp_path / "list" / "config.json").read_text())["num_key_value_heads"] == 2


@pytest.mark.parametrize("size", ["5KB", "12KB", "1GB"])
def test_any_sharding_gives_the_same_tensors(src: Path, tmp_path: Path, size: str) -> None:
    """Invariant 8."""
    model = transformers.AutoModelForCausalLM.from_pretrained(src, dtype="auto")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    convert(src, tmp_path / "one", kv_heads=2)
    convert(tmp_path / "sharded", tmp_path / "many", kv_heads=2, max_shard_size=size, workers=2)
    same(tmp_path / "one", tmp_path / "many")
    for path in (tmp_path / "many").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        nbytes = sum(t.numel() * t.element_size() for t in held)
        assert nbytes <= {"5KB": 5000, "12KB": 12000, "1GB": 10**9}[size] or len(held) == 1
    if size != "1GB":
        index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(
            t.numel() * t.element_size() for t in tensors(tmp_path / "many").values()
        )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype="auto")
    assert loaded.config.num_key_value_heads == 2


def test_streaming_equals_in_memory(src: Path, tmp_path: Path) -> None:
    convert(src, tmp_path / "dst", kv_heads=2)
    after = tensors(tmp_path / "dst")
    for name, old in tensors(src).items():
        if "k_proj" in name or "v_proj" in name:
            old = old.float().unflatten(0, (2, 4, 4)).mean(1).flatten(0, 1).bfloat16()
        assert torch.equal(after[name], old), name


def test_random_depends_on_the_seed_alone(src: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(src, dtype="auto")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    convert(src, tmp_path / "a", kv_heads=2, method="random", seed=1)
    convert(tmp_path / "sharded", tmp_path / "b", kv_heads=2, method="random", seed=1, workers=3)
    convert(src, tmp_path / "c", kv_heads=2, method="random", seed=2)
    same(tmp_path / "a", tmp_path / "b")
    k = "model.layers.0.self_attn.k_proj.weight"
    a, c = tensors(tmp_path / "a"), tensors(tmp_path / "c")
    assert not torch.equal(a[k], c[k])
    assert float(a[k].float().std()) == pytest.approx(0.02, rel=0.2)
    assert not a["model.layers.0.self_attn.k_proj.bias"].any()


def test_ties_are_kept(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path / "src")
    assert "lm_head.weight" not in tensors(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", kv_heads=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_fresh_process_without_this_package_loads_and_generates(src: Path, tmp_path: Path) -> None:
    convert(src, tmp_path / "dst", kv_heads=2)
    script = """
import sys, torch, transformers
sys.modules["hf_attn_patch"] = None
model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
out = model.generate(torch.tensor([[5, 9, 33]]), max_new_tokens=5, min_new_tokens=5, do_sample=False,
                     return_dict_in_generate=True, pad_token_id=0)
assert out.sequences.shape == (1, 8)
assert out.past_key_values.layers[0].keys.shape[1] == 2
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "dst")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_a_plan_prints_what_it_will_do(src: Path) -> None:
    assert "8 changed, 21 copied" in str(plan(src, 2))


def spoil(folder: Path, name: str, file: str = "model.safetensors") -> None:
    held = load_file(folder / file)
    held[name].view(-1)[3] += 0.5
    save_file(held, folder / file, metadata={"format": "pt"})


def test_verify_finds_what_is_wrong(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    convert(src, dst, kv_heads=2, method="first")
    assert verify(src, dst).ok
    spoil(dst, "model.layers.1.self_attn.k_proj.weight")
    spoil(dst, "model.norm.weight")
    result = run("verify", src, dst, code=1)
    assert "model.layers.1.self_attn.k_proj.weight" in result.stdout
    assert "model.norm.weight" in result.stdout
    assert json.loads(run("verify", src, dst, "--json", code=1).stdout)["ok"] is False
    config = json.loads((dst / "config.json").read_text())
    (dst / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1.0}))
    assert any("rms_norm_eps" in line for line in verify(src, dst).differences)
    (src.parent / "other").mkdir(exist_ok=True)
    tiny_model("llama", dtype=torch.bfloat16, seed=1).save_pretrained(src.parent / "other")
    assert any("heads_sha256" in line for line in verify(src.parent / "other", dst).differences)
    (dst / "conversion.json").unlink()
    assert "no conversion.json" in run("verify", src, dst, code=2).stderr
    assert "is no folder" in run("verify", src, tmp_path / "nowhere", code=2).stderr


def test_verify_finds_missing_and_extra_tensors(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    convert(src, dst, kv_heads=2)
    held = load_file(dst / "model.safetensors")
    held["extra"] = held.pop("model.norm.weight")
    save_file(held, dst / "model.safetensors")
    found = verify(src, dst).differences
    assert found == ["tensor 'model.norm.weight' is missing", "tensor 'extra' is too many"]


def test_inspect(src: Path) -> None:
    facts = inspect_source(resolve(src))
    assert facts["kv_bytes_per_token"] == 256
    assert [c["kv_heads"] for c in facts["choices"]] == [8, 4, 2, 1]
    assert [c["kv_bytes_per_token"] for c in facts["choices"]] == [256, 128, 64, 32]
    assert [c["weight_bytes_saved"] for c in facts["choices"]] == [n * 2 * 2 * 4 * 33 * 2 for n in (0, 4, 6, 7)]
    text = run("inspect", src).stdout
    assert "MQA" in text
    assert json.loads(run("inspect", src, "--json").stdout) == facts
    assert "no config.json" in run("inspect", src.parent, code=2).stderr


def test_a_base_model_without_a_head(tmp_path: Path) -> None:
    tiny_model("mistral").model.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", kv_heads=2)
    assert transformers.AutoModel.from_pretrained(tmp_path / "dst").config.num_key_value_heads == 2


def test_a_plan_can_be_made_first_and_carried_out_later(src: Path, tmp_path: Path) -> None:
    made = plan(src, 4)
    convert(made, tmp_path / "dst")
    assert verify(src, tmp_path / "dst").ok
