"""Families of other packages, and what no row accounts for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_families import COMMON

from hf_attn_patch.cli import main
from hf_attn_patch.conversion import ConversionError, convert, plan
from hf_attn_patch.conversion.families import plugins, table
from hf_attn_patch.conversion.families.table import Family, Stack, family_of, register

ROW = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from hf_attn_patch.conversion.families.table import Family

class Config(LlamaConfig):
    model_type = "{name}"

class Model(LlamaForCausalLM):
    config_class = Config

AutoConfig.register("{name}", Config, exist_ok=True)
AutoModelForCausalLM.register(Config, Model, exist_ok=True)
FAMILY = Family(("{name}",))
FAMILIES = [FAMILY]
"""


@pytest.fixture(autouse=True)
def own_table() -> Iterator[None]:
    """Rows that a test registers are gone after it."""
    before = list(table.FAMILIES)
    plugins.add_entry_points.cache_clear()
    yield
    table.FAMILIES[:] = before
    plugins.add_entry_points.cache_clear()


def checkpoint(folder: Path, model_type: str) -> Path:
    """A Llama that calls itself otherwise."""
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON)).save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw.update(model_type=model_type, architectures=["Model"])
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def installed(folder: Path, name: str, value: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip would have put there: a module and a package's metadata with its entry points."""
    (folder / f"{name}_pack.py").write_text(code)
    meta = folder / f"{name}_pack-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-pack\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(f"[hf_attn_patch.families]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize("given", ["FAMILY", "FAMILIES"])
def test_an_installed_packages_family_is_known_to_the_command_line(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"declared{given.lower()}"
    installed(tmp_path, name, f"{name}_pack:{given}", ROW.format(name=name), monkeypatch)
    src = checkpoint(tmp_path / "src", name)
    done = CliRunner().invoke(main, ["inspect", str(src), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["attention"][0]["kv_heads"] == 8
    assert name in table.supported()


def test_a_broken_package_is_told_and_does_no_other_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "broken", "broken_pack:FAMILY", "raise OSError('no disk')", monkeypatch)
    with pytest.warns(UserWarning, match="broken-pack.*OSError: no disk"):
        assert "llama" in table.supported()


def test_a_file_named_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(ROW.format(name="named"))
    src = checkpoint(tmp_path / "src", "named")
    runner = CliRunner()
    call = ["convert", str(src), str(tmp_path / "dst"), "--kv-heads", "2", "--method", "mean", "-q"]
    unknown = runner.invoke(main, call)
    assert unknown.exit_code == 2
    assert "'named' is not supported" in unknown.output
    done = runner.invoke(main, [*call, "--register", str(tmp_path / "rows.py")])
    assert done.exit_code == 0, done.output
    assert load_file(tmp_path / "dst" / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"].shape[0] == 8


@pytest.mark.parametrize(
    ("text", "words"), [(None, "no such file"), ("1 / 0", "ZeroDivisionError"), ("FAMILIES = [3]", "is no Family")]
)
def test_what_cannot_be_registered_is_one_sentence(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "rows.py").write_text(text)
    done = CliRunner().invoke(main, ["inspect", "anywhere", "--register", str(tmp_path / "rows.py")])
    assert done.exit_code == 2
    assert words in done.output
    assert "Traceback" not in done.output


def with_a_norm_before_the_output(folder: Path) -> Path:
    """A BitNet, whose ``attn_sub_norm`` stands between V and O."""
    torch.manual_seed(0)
    transformers.BitNetForCausalLM(transformers.BitNetConfig(**COMMON)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["aligned", "auto"])
def test_what_no_row_accounts_for_is_refused_by_methods_that_turn_heads(method: str, tmp_path: Path) -> None:
    src = with_a_norm_before_the_output(tmp_path / "src")
    register(Family(("bitnet",), (Stack(),)))  # as docs/extending.md would have it for a family like Llama
    with pytest.raises(ConversionError, match=r"account for model\.layers\.0\.self_attn\.attn_sub_norm\.weight.*mean"):
        plan(src, 2, method=method)
    convert(src, tmp_path / "dst", 2, method="mean")


def test_the_row_of_bitnet_keeps_its_values_where_they_are(tmp_path: Path) -> None:
    src = with_a_norm_before_the_output(tmp_path / "src")
    record = convert(src, tmp_path / "dst", 2, method="aligned")
    assert len(record["details"]["values_averaged"]) == 2
    before, after = load_file(src / "model.safetensors"), load_file(tmp_path / "dst" / "model.safetensors")
    name = "model.layers.0.self_attn.{}_proj.weight"
    assert torch.equal(before[name.format("o")], after[name.format("o")])
    pooled = before[name.format("v")].unflatten(0, (2, 4, 4)).mean(1).flatten(0, 1)
    torch.testing.assert_close(after[name.format("v")], pooled)


@pytest.mark.parametrize(
    "extra",
    ["self_attn.q_norm.weight", "self_attn.v_bias_scale", "self_attn.sub.gain", "self_attn.o_proj.lora_A.weight"],
)
def test_any_tensor_inside_counts(extra: str, tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON)).save_pretrained(tmp_path / "src")
    state = load_file(tmp_path / "src" / "model.safetensors")
    state[f"model.layers.1.{extra}"] = torch.ones(4)
    save_file(state, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=f"layers.1.{extra}"):
        plan(tmp_path / "src", 2, method="aligned", check_load=False)


def test_every_row_accounts_for_what_its_models_keep() -> None:
    """By hand: buffers of old checkpoints are no surprise."""
    from hf_attn_patch.conversion.families.accounts import unaccounted
    from hf_attn_patch.conversion.families.layer import stack_layers

    config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=1)
    (stack, *_) = family_of("gpt2").stacks
    (layer,) = stack_layers(stack, config, "here")
    known = {"h.0.attn.bias": (1, 1, 8, 8), "h.0.attn.masked_bias": (), "h.0.attn.c_attn.weight": (32, 96)}
    assert unaccounted(sorted(known), layer, known) == []
    known["h.0.attn.bias"] = (32,)  # no mask
    assert unaccounted(sorted(known), layer, known) == ["h.0.attn.bias"]
