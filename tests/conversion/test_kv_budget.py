"""A number of KV heads for each layer: configs that hold a list, and numbers chosen under a budget."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny import python_sources, save_tiny, tiny_llama, trained_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from zoo_cases import BY_NAME

from hf_attn_patch import explain
from hf_attn_patch.cli import main
from hf_attn_patch.conversion import ConversionError, budget, convert, evaluate, kv_heads_under_budget, verify
from hf_attn_patch.errors import GroupingError

LAYERED = ("gpt2", "gpt_neox", "gptj", "codegen", "opt", "biogpt", "bloom", "mpt")
IDS = torch.randint(2, 500, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", LAYERED)
def test_a_list_is_saved_loaded_cached_and_generated_with(name: str, tmp_path: Path) -> None:
    BY_NAME[name].make(None, vocab_size=512).save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", [4, 2], method="mean")
    assert verify(tmp_path / "src", tmp_path / "dst").ok
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["num_key_value_heads"] == [4, 2]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", attn_implementation="hf_attn_patch").eval()
    assert model.config.num_key_value_heads == [4, 2]
    with torch.no_grad():
        out = model(IDS, use_cache=True)
        eager = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", attn_implementation="eager").eval()(IDS)
    assert [layer.keys.shape[1] for layer in out.past_key_values.layers] == [4, 2]
    torch.testing.assert_close(out.logits, eager.logits, atol=1e-4, rtol=1e-4)
    known = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    words = [model.generate(IDS, cache_implementation=kind, **known) for kind in (None, "static")]
    assert torch.equal(*words)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, out.logits, atol=1e-4, rtol=1e-4)
    assert "triton_decode" in str(explain(model))


def test_as_many_heads_in_a_list_is_the_stock_model(tmp_path: Path) -> None:
    model = BY_NAME["gpt2"].make(None, vocab_size=512)
    model.save_pretrained(tmp_path / "src")
    stock = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    config = AutoConfig.for_model("gqa_gpt2", **{**stock, "num_key_value_heads": [4, 4]})
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "src", config=config).eval()
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("numbers", [[4], [4, 2, 1], [4, 3], [4, 0]])
def test_lists_that_do_not_fit(numbers: list[int]) -> None:
    with pytest.raises(GroupingError):
        AutoConfig.for_model("gqa_gpt2", n_head=4, n_layer=2, n_embd=32, num_key_value_heads=numbers)


def test_the_smallest_sum_of_errors_by_trying_all() -> None:
    draw = torch.Generator().manual_seed(0)
    for case in range(30):
        errors = []
        for _ in range(3):
            known = sorted(torch.rand(3, generator=draw).tolist(), reverse=True)
            errors.append(dict(zip((1, 2, 4, 8), [*known, 0.0], strict=True)))
        most = 3 + case % 22
        fitting = [n for n in itertools.product((1, 2, 4, 8), repeat=3) if sum(n) <= most]
        want = min(sum(e[n] for e, n in zip(errors, numbers, strict=True)) for numbers in fitting)
        got = budget.allot(errors, most)
        assert sum(got) <= most
        assert sum(e[n] for e, n in zip(errors, got, strict=True)) == pytest.approx(want)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose first layer's heads are all alike, the second's are not."""
    out = tmp_path_factory.mktemp("budget")
    model = BY_NAME["gpt2"].make(None, vocab_size=512)
    with torch.no_grad():
        for i, block in enumerate(model.transformer.h):
            weight = block.attn.c_attn.weight  # [E, 3 * E]: q, k, v
            weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))
            if i == 0:
                kv = weight[:, weight.shape[0] :].view(weight.shape[0], 2, 4, -1)
                kv[:] = kv[:, :, :1].clone()
                bias = block.attn.c_attn.bias[weight.shape[0] :].view(2, 4, -1)
                bias[:] = bias[:, :1].clone()
    model.save_pretrained(out / "src")
    trained_tokenizer().save_pretrained(out / "src")
    (out / "text.txt").write_text("".join(p.read_text() for p in python_sources())[:20_000])
    return out


def test_heads_stay_where_they_are_needed(folder: Path, tmp_path: Path) -> None:
    known: dict[str, Any] = {
        "calibrate": str(folder / "text.txt"),
        "calibration_tokens": 1500,
        "calibration_length": 16,
    }
    assert kv_heads_under_budget(folder / "src", 0.625, **known) == [1, 4]
    assert kv_heads_under_budget(folder / "src", 0.5, **known) == [1, 2]
    assert kv_heads_under_budget(folder / "src", 0.25, **known) == [1, 1]
    assert kv_heads_under_budget(folder / "src", 1.0, **known) == [1, 4]  # what is lossless costs nothing
    command = ["convert", str(folder / "src"), str(tmp_path / "dst"), "--kv-budget", "0.625", "--calibrate",
               known["calibrate"], "--calibration-tokens", "1500", "--calibration-length", "16"]  # fmt: skip
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "experimental): 1, 4" in done.stderr
    src, dst = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (folder / "src", tmp_path / "dst"))
    assert dst.config.num_key_value_heads == [1, 4]
    with torch.no_grad():
        torch.testing.assert_close(dst(IDS).logits, src(IDS).logits, atol=1e-4, rtol=1e-4)  # nothing was lost
    text = str(folder / "text.txt")
    (found,) = evaluate([str(tmp_path / "dst")], text, context=16, tokens=64, speed=False)
    width = src.config.n_embd // 4
    assert found.kv_bytes_per_token == (1 + 4) * 2 * width * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv-budget", "0.25"], "give --calibrate TEXT"),
        (["--kv-budget", "0.25", "--kv-heads", "2", "--calibrate", "text.txt"], "say how many KV heads"),
        ([], "say how many KV heads"),
        (["--kv-budget", "0.1", "--calibrate", "text.txt"], "give at least 0.25"),
        (["--kv-budget", "25", "--calibrate", "text.txt"], "a share of the KV cache, such as 0.25"),
        (["--kv-budget", "0.5", "--calibrate", "nothing.txt"], "no file"),
    ],
)
def test_what_cannot_be_chosen(options: list[str], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(main, ["convert", "src", "dst", *options])
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not Path("dst").exists()


def test_an_architecture_with_one_number(folder: Path, tmp_path: Path) -> None:
    src = save_tiny(tmp_path / "src", tiny_llama(4))
    with pytest.raises(ConversionError, match="one number of KV heads for all layers"):
        kv_heads_under_budget(src, 0.5, calibrate=str(folder / "text.txt"))


def test_ranges_name_layers(tmp_path: Path) -> None:
    """Layers from 0 on, both ends included; the others stay; what names no layer or one twice is refused."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from hf_attn_patch.conversion import ConversionError, plan

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "src")
    heads, last = config.n_head, config.n_layer - 1
    made = plan(tmp_path / "src", {f"{last}": 1}, method="mean")
    assert [layer.new_kv_heads for layer in made.layers] == [heads] * last + [1]
    for wrong in ({f"0-{last + 1}": 1}, {"1-0": 1}, {"0": 1, f"0-{last}": 1}, {"0x": 1}):
        with pytest.raises(ConversionError, match="range"):
            plan(tmp_path / "src", wrong, method="mean")
