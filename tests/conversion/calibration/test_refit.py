"""Fitting layer by layer: it changes nothing where nothing is lost, helps where something is, and is reproducible."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny import python_sources, save_tiny, tiny_llama, trained_tokenizer
from transformers import AutoModelForCausalLM

from hf_attn_patch.cli import main
from hf_attn_patch.conversion import ConversionError, convert, evaluate, plan, verify
from hf_attn_patch.conversion.calibration.moments import Moments
from hf_attn_patch.conversion.calibration.refit import RefitRecipe, TwoStreams, refit
from hf_attn_patch.conversion.families.layer import stack_layers
from hf_attn_patch.conversion.families.table import Stack
from hf_attn_patch.conversion.methods import registry as methods
from hf_attn_patch.conversion.reports.evaluation import windows

SMALL: dict[str, Any] = {"calibration_tokens": 6000, "calibration_length": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """src: four different heads; same: heads in pairs equal; text.txt."""
    out = tmp_path_factory.mktemp("refit")
    model = tiny_llama(4)
    with torch.no_grad():
        for layer in model.model.layers:
            for p in layer.self_attn.parameters():
                p.normal_(0, 0.2)
    save_tiny(out / "src", model)
    with torch.no_grad():
        for layer in model.model.layers:
            for p in (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight):
                heads = p.view(2, 2, -1, p.shape[1])
                heads[:, 1] = heads[:, 0]
    save_tiny(out / "same", model)
    (out / "text.txt").write_text("".join(p.read_text() for p in python_sources())[:60_000])
    return out


def logits(path: Path) -> torch.Tensor:
    """Of text that is not in the calibration text."""
    words = trained_tokenizer()(python_sources()[-1].read_text())["input_ids"]
    ids = torch.tensor(words[: 4 * 32]).view(4, 32)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path)(ids).logits


def test_better_than_merging_alone_and_reproducible(folder: Path, tmp_path: Path) -> None:
    text = str(folder / "text.txt")
    record = convert(folder / "src", tmp_path / "a", 1, calibrate=text, **SMALL)
    convert(folder / "src", tmp_path / "b", 1, calibrate=text, **SMALL)
    convert(folder / "src", tmp_path / "plain", 1, calibrate=text, refit=False, **SMALL)
    assert record["method"] == "calibrated"
    cards = [(tmp_path / name / "README.md").read_text() for name in ("a", "plain")]
    assert ["layers were fitted to the source's" in card for card in cards] == [True, False]
    assert not any("recomputes" in card for card in cards)  # what depends on a text is not computed again
    assert record["details"]["calibration"]["tokens"] == 187 * 32
    for fit in record["details"]["layers"].values():
        assert fit["refitted"] < 0.9 * fit["error"]
    truth = logits(folder / "src")
    error = {name: float((logits(tmp_path / name) - truth).norm()) for name in ("a", "plain")}
    assert error["a"] < 0.95 * error["plain"]  # on text that neither has seen
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = convert(folder / "src", tmp_path / "c", 1, calibrate=text, seed=1, **SMALL)
    assert other["details"]["calibration"]["ids_sha256"] != record["details"]["calibration"]["ids_sha256"]


def test_nothing_changes_where_nothing_is_lost(folder: Path, tmp_path: Path) -> None:
    text = str(folder / "text.txt")
    record = convert(folder / "same", tmp_path / "fit", 2, calibrate=text, **SMALL)
    convert(folder / "same", tmp_path / "plain", 2, calibrate=text, refit=False, **SMALL)
    assert all(fit["refitted"] == fit["error"] < 1e-10 for fit in record["details"]["layers"].values())
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("fit", "plain"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    torch.testing.assert_close(logits(tmp_path / "fit"), logits(folder / "same"), atol=1e-4, rtol=1e-4)


def test_only_what_the_method_names_is_changed(folder: Path, tmp_path: Path) -> None:
    record = convert(folder / "src", tmp_path / "one", 2, calibrate=str(folder / "text.txt"), **SMALL)
    old, new = (load_file(p / "model.safetensors") for p in (folder / "src", tmp_path / "one"))
    changed = {n for n in old if old[n].shape != new[n].shape or not torch.equal(old[n], new[n])}
    assert changed == {n for n in old if ".self_attn." in n}
    assert len(record["details"]["layers"]) == 2
    assert verify(folder / "src", tmp_path / "one").ok
    assert not verify(folder / "same", tmp_path / "one").ok


def test_fitting_in_memory_is_reproducible_and_leaves_the_rest_alone(folder: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(folder / "src").eval().requires_grad_(False)
    ids = torch.randint(2, 500, (64, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(2):
        student = copy.deepcopy(teacher)
        with torch.no_grad():
            for layer in student.model.layers:
                layer.self_attn.k_proj.weight.mul_(0.5)
        for p in student.parameters():
            p.requires_grad_(True)
        errors = refit(
            teacher, student.model.layers, teacher.model.layers, ids, RefitRecipe(epochs=2),
            trained=lambda layer: list(layer.get_submodule("self_attn").parameters()),
        )  # fmt: skip
        found.append((errors, student.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(after < before for before, after in found[0][0])
    assert all(torch.equal(found[0][1][n], t) for n, t in found[1][1].items())
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, teacher.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(("rate", "quarters"), [(0.02, 4), (0.3, 1 + 4), (1.0, 1 + 1 + 4)])
def test_an_attempt_that_leads_nowhere_is_given_up_early(rate: float, quarters: int) -> None:
    """A linear layer near the one that it is fitted to: rates that throw it far off are left after a quarter of the
    steps, and the next is four times smaller. 56 of 64 sequences are taught, 4 at a time, 8 times."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 4, 8, generator=draw), torch.randn(8, 8, generator=draw)
    streams = TwoStreams(hidden, RefitRecipe(lr=rate), device=torch.device("cpu"))
    size = streams.original(lambda x, _: x @ weight)
    parameter = torch.nn.Parameter(weight + 0.02 * torch.randn(8, 8, generator=draw))
    taught: list[bool] = []

    def layer(x: torch.Tensor, _: object) -> torch.Tensor:
        taught.append(torch.is_grad_enabled())
        return x @ parameter

    before, after = streams.fit(layer, [parameter], size)
    assert sum(taught) == quarters * 8 * (56 // 4) // 4
    assert after < 0.01 * before and parameter.grad is None


def test_moments_in_parts_are_moments_at_once() -> None:
    layer = stack_layers(Stack(), tiny_llama(4).config, "here")[0]
    attention = tiny_llama(4).model.layers[0].self_attn
    x = torch.randn(10, 7, 64)
    x[3, 2] = float("nan")
    with Moments(attention, layer) as moments:
        for part in x.split(3):
            attention.q_proj(part)
    ((moment, note),) = moments.results()
    rows = torch.cat([x, torch.ones(10, 7, 1)], -1).flatten(0, 1).double()
    rows = rows[rows.isfinite().all(-1)]
    assert note is not None and "1 of 70" in note
    assert moment is not None
    torch.testing.assert_close(moment, rows.T @ rows / 69, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no text"), (b" \n \n", "no text"), (bytes(range(256)) * 20, "is no text"), (b"x", "too few")],
)
def test_odd_texts_are_refused(folder: Path, tmp_path: Path, content: bytes, message: str) -> None:
    text = tmp_path / "odd.txt"
    text.write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        convert(folder / "src", tmp_path / "dst", 1, calibrate=str(text))
    assert not (tmp_path / "dst").exists()


def test_one_line_gives_a_sound_model_and_a_note(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "line.txt"
    text.write_text("def add(first, second): return first + second  # no more than that")
    record = convert(folder / "src", tmp_path / "dst", 1, calibrate=str(text))
    assert any("nothing was fitted" in note for note in record["details"]["notes"])
    assert any("rank" in note for note in record["details"]["notes"])
    convert(folder / "src", tmp_path / "mean", 1, method="mean")
    truth = logits(folder / "src")
    assert (logits(tmp_path / "dst") - truth).norm() < (logits(tmp_path / "mean") - truth).norm()


def test_what_needs_a_text_says_so(folder: Path, tmp_path: Path) -> None:
    assert plan(folder / "src", 1, method="auto").method.name == "calibrated"  # a causal model writes a text
    with pytest.raises(ConversionError, match="--calibrate"):
        methods.method_named("calibrated", {})
    assert plan(folder / "src", 1, calibrate="x.txt").method.name == "calibrated"
    with pytest.raises(ConversionError, match="no file or folder"):
        convert(folder / "src", tmp_path / "dst", 1, calibrate="./nothing.txt")


def test_windows_score_every_token_once() -> None:
    for count in range(2, 40):
        for context in (2, 5, 8):
            for stride in range(1, context):
                found = list(windows(count, context, stride))
                assert [t for _, end, first in found for t in range(first, end)] == list(range(1, count))
                assert all(0 < end - begin <= context and begin < first for begin, end, first in found)


def test_evaluate(folder: Path, tmp_path: Path) -> None:
    """The loss of one window is transformers' own; a model's distance to itself is none."""
    src, text = str(folder / "src"), folder / "text.txt"
    twin = str(shutil.copytree(src, tmp_path / "twin"))
    source, found = evaluate([twin], text, source=src, context=64, tokens=64, speed=False)
    assert (source.model, source.kl, source.agreement) == (src, 0, 1)  # what was lost is seen beside what there was
    assert source.loss == pytest.approx(found.loss)
    assert [e.model for e in evaluate([twin, src], text, source=src, tokens=20, speed=False)] == [twin, src]
    model = AutoModelForCausalLM.from_pretrained(src).eval()
    ids = torch.tensor([trained_tokenizer()(text.read_text())["input_ids"][:64]])
    with torch.no_grad():
        want = model(ids, labels=ids).loss
    assert found.loss == pytest.approx(float(want), rel=1e-4)
    assert found.kl == pytest.approx(0, abs=1e-5)
    assert (found.agreement, found.scored) == (1.0, 63)
    assert found.kv_bytes_per_token == 2 * 2 * 4 * 16 * 4


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    src, dst, text = str(folder / "src"), str(tmp_path / "dst"), str(folder / "text.txt")
    options = ["--calibration-tokens", "3000", "--calibration-length", "32", "--no-refit"]
    made = run(main, ["convert", src, dst, "--kv-heads", "2", "--calibrate", text, *options])
    assert made.exit_code == 0, made.output
    assert run(main, ["verify", src, dst]).exit_code == 0
    picture = tmp_path / "out.png"
    shown = run(
        main,
        ["evaluate", src, dst, "--text", text, "--source", src, "--context", "32", "--tokens", "200", "--plot",
         str(picture)],
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert "199 tokens scored" in shown.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    missing = run(main, ["evaluate", src, "--text", "nowhere.txt"])
    assert missing.exit_code == 2 and "no file" in missing.output


def test_the_default_is_the_best_that_can_be_done_with_what_is_given() -> None:
    assert methods.method_named(None, {}).name == "aligned"
    assert methods.method_named(None, {"calibrate": "text"}).name == "calibrated"
