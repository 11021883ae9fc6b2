"""Conversion without a text: what a model writes follows its own distribution, is calibrated on by default, and what
was lost is measured on what was held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny import save_tiny, tiny_llama
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from hf_attn_patch.cli import main
from hf_attn_patch.conversion import convert, plan, verify
from hf_attn_patch.conversion.calibration import choice
from hf_attn_patch.conversion.calibration.gather import gathered, parse_sources
from hf_attn_patch.conversion.calibration.installed import installed_documents
from hf_attn_patch.conversion.calibration.layers import load
from hf_attn_patch.conversion.calibration.own_samples import own_samples
from hf_attn_patch.conversion.methods import registry
from hf_attn_patch.conversion.reports import held_out
from hf_attn_patch.errors import ConversionError

SMALL: dict[str, Any] = {"calibration_tokens": 4096, "calibration_length": 32}


@pytest.fixture(autouse=True)
def _real_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DEFAULT", registry.AUTO)


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says something definite, and whose heads differ."""
    torch.manual_seed(0)
    model = tiny_llama(4)
    with torch.no_grad():
        for layer in model.model.layers:
            for p in layer.self_attn.parameters():
                p.normal_(0, 0.3)
        model.lm_head.weight.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("own") / "src"
    save_tiny(folder, model)
    return folder


def distance(one: Path, other: Path) -> float:
    """KL between two checkpoints on ids that neither wrote, by transformers alone."""
    ids = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        p, q = (AutoModelForCausalLM.from_pretrained(f)(ids).logits.log_softmax(-1) for f in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_samples_follow_the_model() -> None:
    """Pairs of first and second token occur as often as a plain forward says: chi-square over all of them."""
    V, N = 8, 8192
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.5)
    ids = own_samples(model, 3 * N, 3, seed=3, row_bytes=1)
    assert ids.shape == (N, 3)
    with torch.no_grad():
        after = model(torch.arange(V)[:, None]).logits[:, 0].softmax(-1)
        last = model(ids[:, :2]).logits[:, 1].softmax(-1)
    want = N * after / V
    got = torch.zeros(V, V).index_put_((ids[:, 0], ids[:, 1]), torch.ones(N), accumulate=True)
    freedom = V * V - 1
    assert ((got - want).square() / want).sum() < freedom + 5 * (2 * freedom) ** 0.5
    third = torch.zeros(V).index_add_(0, ids[:, 2], torch.ones(N))  # the third token sees the second
    assert ((third - last.sum(0)).square() / last.sum(0)).sum() < V + 5 * (2 * V) ** 0.5
    assert torch.equal(ids, own_samples(model, 3 * N, 3, seed=3, row_bytes=1))
    assert not torch.equal(ids, own_samples(model, 3 * N, 3, seed=4, row_bytes=1))


def test_without_a_text_a_model_writes_its_own(src: Path, tmp_path: Path) -> None:
    assert plan(src, 1).method.name == "calibrated"
    record = convert(src, tmp_path / "own", 1)
    convert(src, tmp_path / "mean", 1, method="mean")
    assert record["details"]["calibration"]["parts"] == {"own": 4096}
    assert any("nothing was fitted" in note and "GPU" in note for note in record["details"]["notes"])
    assert distance(src, tmp_path / "own") < distance(src, tmp_path / "mean")
    assert verify(src, tmp_path / "own").ok


def test_nothing_is_sampled_where_nothing_is_merged(src: Path, tmp_path: Path) -> None:
    record = convert(src, tmp_path / "dst", 4)
    assert record["method"] == "calibrated" and record["details"]["notes"] == []
    card = (tmp_path / "dst" / "README.md").read_text()
    assert "No heads were merged" in card and "fewer KV heads" not in card
    assert "calibrat" not in card.partition("No heads")[0]


@pytest.mark.parametrize(
    ("name", "number"),
    [("calibration_tokens", 0), ("calibration_length", 1), ("calibration_samples", 0), ("polish", -1)],
)
def test_numbers_that_give_no_text_are_refused(name: str, number: int, src: Path) -> None:
    with pytest.raises(ConversionError, match=f"--{name.replace('_', '-')} {number}: give at least {number + 1}"):
        plan(src, 2, **dict[str, Any]({name: number}))


def test_a_short_pass_is_written_no_more_text_than_it_needs(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on a CPU writes hundreds of tokens a second: a million for a pass of three thousand took hours."""
    asked: list[int] = []

    def gathered(*_: Any, tokens: int, **__: Any) -> None:
        asked.append(tokens)
        raise ConversionError("enough")

    monkeypatch.setattr(choice, "gathered", gathered)
    made = plan(src, 2, calibrate="own")
    for polish in (3000, 300_000, 9_000_000):
        with pytest.raises(ConversionError, match="enough"):
            choice.calibrated(made, calibrate="own", polish=polish, device="cpu")
    assert asked == [1 << 16, 300_000, 1 << 20]


def test_equal_heads_lose_nothing_without_a_text(src: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(src)
    with torch.no_grad():
        for layer in model.model.layers:
            for p in (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight):
                heads = p.view(2, 2, -1, p.shape[1])
                heads[:, 1] = heads[:, 0]
    save_tiny(tmp_path / "src", model)
    record = convert(tmp_path / "src", tmp_path / "dst", 2)
    assert distance(tmp_path / "src", tmp_path / "dst") < 1e-6
    found = record["details"]["held_out"]
    assert found["loss_after"] == pytest.approx(found["loss_before"], abs=1e-4) and not found["seen"]


def test_polish_lowers_what_it_says_and_touches_attention_alone(src: Path, tmp_path: Path) -> None:
    merged = convert(src, tmp_path / "merged", 1, polish=0, calibrate="own", **SMALL)["details"]
    done = convert(src, tmp_path / "done", 1, polish=40_000, calibrate="own", **SMALL)["details"]
    assert done["polish"]["kl_after"] < 0.97 * done["polish"]["kl_before"]
    assert done["polish"]["kl_before"] == pytest.approx(merged["held_out"]["kl"], rel=1e-3)
    assert distance(src, tmp_path / "done") < distance(src, tmp_path / "merged")
    before, after = (load_file(f / "model.safetensors") for f in (src, tmp_path / "done"))
    assert all(torch.equal(before[n], after[n]) for n in before if "self_attn" not in n)
    # the loss that is told is that of the stored model on the first sequences, which were held out
    made = plan(src, 1)
    ids, *_ = gathered(
        made, load(made), None, "own", tokens=4096, length=32, longest=32, whole=False, device=torch.device("cpu")
    )
    with torch.no_grad():
        for folder, name in ((src, "loss_before"), (tmp_path / "done", "loss_after")):
            model = AutoModelForCausalLM.from_pretrained(folder)
            assert done["held_out"][name] == pytest.approx(float(model(ids[:16], labels=ids[:16]).loss), abs=1e-4)


def test_sources_by_shares(src: Path, tmp_path: Path) -> None:
    text = tmp_path / "a,b.txt"
    text.write_text("alpha beta gamma delta " * 3000)
    assert parse_sources(str(text)) == [(str(text), 1.0)]
    plain = text.rename(tmp_path / "ab.txt")
    record = convert(src, tmp_path / "dst", 1, calibrate=f"own:1,python:1,{plain}:2", refit=False, polish=0, **SMALL)
    assert record["details"]["calibration"]["parts"] == {"own": 1024, "python": 1024, str(plain): 2048}
    with pytest.raises(ConversionError, match="shares"):
        parse_sources("own:0,python:1")
    plain.write_text("alpha beta gamma " * 3)
    with pytest.raises(ConversionError, match="no whole sequence"):
        convert(src, tmp_path / "short", 1, calibrate=f"own,{plain}", calibration_tokens=4096, calibration_length=64)


def test_installed_text_is_there_and_in_an_order_of_its_own() -> None:
    first = [text for text, _ in zip(installed_documents(0), range(5), strict=False)]
    again = [text for text, _ in zip(installed_documents(0), range(5), strict=False)]
    other = [text for text, _ in zip(installed_documents(1), range(5), strict=False)]
    assert first == again != other and all(text.strip() for text in first)


def test_installed_text_does_not_depend_on_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not on names above it, such as those of the folders that are left out."""
    found = []
    for library, packages in (("a", "z"), ("site-packages/z", "a")):
        paths = {"stdlib": tmp_path / library, "purelib": tmp_path / "packages" / packages}
        for folder, name in (
            ("stdlib", "os.py"),
            ("stdlib", "site-packages/no.py"),
            ("purelib", "x.dist-info/METADATA"),
        ):
            path = paths[folder] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{folder} {name}")
        monkeypatch.setattr("sysconfig.get_path", lambda name, paths=paths: str(paths[name]))
        found.append(list(installed_documents(0)))
    assert found[0] == found[1] and sorted(found[0]) == ["purelib x.dist-info/METADATA", "stdlib os.py"]


def test_the_command_tells_what_was_lost(src: Path, tmp_path: Path) -> None:
    """Of any method, last, and with a way out where it is much."""
    run = CliRunner().invoke
    for method in ("calibrated", "random"):
        shown = run(
            main, ["convert", str(src), str(tmp_path / method), "--kv-heads", "1", "--method", method]
        )  # fmt: skip
        assert shown.exit_code == 0, shown.output
        assert "held-out text" in shown.output and "before" in shown.output
    assert "Warning" in shown.output.splitlines()[-1] and "--method auto" in shown.output.splitlines()[-1]
    harmless = {"loss_before": 2.0, "loss_after": 2.1, "kl": held_out.BOUND}
    assert held_out.warning(harmless, "mean") is None
    assert "--polish" in (held_out.warning(harmless | {"kl": 2 * held_out.BOUND}, "calibrated") or "")


def test_what_cannot_write_reads_random_inputs(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BertForMaskedLM(
        BertConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "bert")
    assert plan(tmp_path / "bert", 1).method.name == "aligned"
    with pytest.raises(ConversionError, match="needs a calibration text"):
        plan(tmp_path / "bert", 1, method="calibrated")

    def fails(*_: object, **__: object) -> None:
        raise ConversionError("it cannot write")

    monkeypatch.setattr(choice, "gathered", fails)
    record = convert(src, tmp_path / "dst", 1)
    assert any("random inputs" in note and "it cannot write" in note for note in record["details"]["notes"])
    with pytest.raises(ConversionError, match="cannot write"):  # what was asked for is not replaced
        convert(src, tmp_path / "asked", 1, calibrate="own")
