"""The benchmarks run from end to end at toy sizes, and hold what they time to the truth first."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


AS_SCRIPTS = """
import importlib.util, runpy, sys
(folder, *scripts), rest = sys.argv[1:], sys.path[1:]
for script in scripts:
    sys.path[:], sys.argv = [folder, *rest], [script, "--help"]  # as `python SCRIPT --help` would
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as done:
        assert done.code in (0, None), script
    found = importlib.util.find_spec("kernels")
    assert found is None or not found.origin.startswith(folder), f"{script} lets kernels.py pass for a package"
"""


def test_the_scripts_start_and_kernels_py_passes_for_no_package() -> None:
    """transformers and TRL look for a package ``kernels``, and a script's own folder is where Python looks first."""
    folder = ROOT / "benchmarks"
    scripts = [path for path in folder.glob("*.py") if "__main__" in path.read_text() and path.stem != "draw"]
    assert len(scripts) >= 9
    command = [sys.executable, "-c", AS_SCRIPTS, str(folder), *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for script in scripts:
        assert f"usage: {script.name}" in done.stdout


def test_generate(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate = load("generate")
    path = tmp_path / "generate.json"
    args = ["--small", "--out", str(path), "--forms"]
    assert generate.main([*args, "sdpa,static,flash"]) == 0
    assert generate.main([*args, "sdpa,one at a time,sampling"]) == 0
    result = json.loads(path.read_text())
    rows = {generate.key(row): row for row in result["rows"]}
    forms = ("sdpa", "sdpa, static cache, compiled", "flash_attention_4", *(f.name for f in generate.FORMS[7:9]))
    assert set(rows) == {(form, B, 24) for form in forms for B in (1, 2)}  # and none of them twice
    assert len(rows) == len(result["rows"])
    for (form, B, _), row in rows.items():
        assert ("failed" in row) == (form == "flash_attention_4")
        if "failed" not in row:
            weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 64 * 128
            keys = (24 if B == 1 else 12 + 24) + B * 8  # on average, of each layer and KV head
            limit = B * row["copy_bytes"] / (4 * (weights + 2 * 2 * 2 * 16 * keys))
            assert row["of_limit"] == pytest.approx(row["tokens_per_second"] / limit)
    capsys.readouterr()
    assert generate.main(["--report", "--out", str(path)]) == 0
    assert "### 2 prompts of 12 to 24 tokens, padded on the left" in capsys.readouterr().out
    model = generate.build(generate.SMALL, torch.float32)
    inputs = generate.prompts(2, 24, 128)
    best = generate.generate(model, generate.FORMS[0], inputs, 8)
    assert generate.worst_choice(model, inputs, best) < 1e-3
    best[1, -3] = (best[1, -3] + 1) % 128
    assert generate.worst_choice(model, inputs, best) > 0.1


def test_models(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = load("models")
    args = ["--tiny", "--kv-heads", "8", "--peers", "sdpa", "--sections", "prefill,train", "--forms", "padded,packed"]
    assert models.main([*args, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "models.json").read_text())
    rows = {(row["kind"], row["form"], row["implementation"]): row for row in result["rows"]}
    assert len(rows) == 3 + 3 + 2
    for (_, form, _), row in rows.items():
        tokens, all_tokens = row["tokens_per_second"] * row["seconds"], row["B"] * row["S"]
        assert tokens == pytest.approx(all_tokens) if form == "packed" else tokens < all_tokens  # real ones only
    assert "hf_attn_patch + unpadded" in capsys.readouterr().out
    drawn(load, tmp_path / "models.json", "Tokens a second")


def drawn(load: Any, path: Path, text: str) -> None:
    pytest.importorskip("matplotlib").rcParams["svg.fonttype"] = "none"  # text stays text
    assert load("draw").main([str(path)]) == 0
    assert text in path.with_suffix(".svg").read_text()


def test_models_that_are_wrong_are_not_timed(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, calls = load("models"), load("model_calls")
    monkeypatch.setattr(models, "check_conformance", lambda *args: None)
    right = calls.decode

    def wrong(model: Any, variant: Any, inputs: Any) -> Any:
        work, result = right(model, variant, inputs)
        return work, lambda: [r + (variant.growing * r.abs().max()) for r in result()]

    monkeypatch.setattr(calls, "decode", wrong)
    args = ["--tiny", "--kv-heads", "8", "--peers", "", "--sections", "decode", "--forms", "padded"]
    assert models.main([*args, "--out", str(tmp_path / "x.json")]) == 1
    dynamic, growing, graphs = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert all("differs from sdpa" in row["failed"] for row in (growing, graphs))
    assert dynamic["tokens_per_second"] * dynamic["seconds"] == pytest.approx(dynamic["B"])
    assert "seconds" not in growing


def test_claims(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("claims").main(["--tiny", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "claims.json").read_text())
    assert [row["kv_bytes"] for row in result["sharing"][:3]] == [2 * 2 * n * 24 * 64 * 4 for n in (12, 3, 1)]
    assert "GQA 4:1 (3 KV heads)" in capsys.readouterr().out
    drawn(load, tmp_path / "claims.json", "KV cache, MiB, 168 points")


def test_the_table_and_medians(load: Any) -> None:
    measure = load("measure")
    assert measure.table(("a", "b"), [("x", "1"), ("yy", "22")]).splitlines() == [
        "| a  |  b |",
        "|----|---:|",
        "| x  |  1 |",
        "| yy | 22 |",
    ]
    calls: list[int] = []
    assert measure.median_seconds(lambda: calls.append(1), warmup=2, repeats=5) < 0.1
    assert len(calls) == 7
    assert torch.isfinite(torch.tensor(list(measure.limits(tiny=True).values()))).all()


def test_kernels(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("kernels").main(["--tiny", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["section"] for row in rows} == set(load("kernels").SECTIONS)
    for row in rows:
        if row["section"] not in ("paged", "codes"):  # want a GPU
            assert row["results"]["ours"]["us"] > 0
    by_name = {row["name"]: row for row in rows}
    assert by_name["2, 96, 4/2, 32"]["work"] == 2 * (2 * 96 * 2 * 32) * 4  # K and V in fp32
    assert by_name["1, 96, 4/2, 32 causal"]["work"] == 4 * 4 * 32 * (96 * 97 // 2)
    assert "packed" in capsys.readouterr().out
    drawn(load, tmp_path / "kernels.json", "share of what memory")


def test_kernels_that_are_wrong_are_not_timed(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, peers = load("kernels"), load("kernel_peers")

    def off(x: Any) -> Any:
        call = peers.ours(x)
        return lambda i: call(i) + 0.01

    def broken(x: Any) -> Any:
        raise RuntimeError("no such kernel")

    contenders = {"ours": peers.ours, "off": off, "broken": broken}
    monkeypatch.setattr(kernels, "contenders", lambda with_flex: contenders)
    args = ["--tiny", "--sections", "decode,training", "--rows", "1, 96, 4/2", "--out", str(tmp_path / "x.json")]
    assert kernels.main(args) == 0
    for row in json.loads((tmp_path / "x.json").read_text())["rows"]:
        assert "is over" in row["results"]["off"]["wrong"] and "us" not in row["results"]["off"]
        assert "no such kernel" in row["results"]["broken"]["failed"]
        assert row["results"]["ours"]["us"] > 0 and "ratio" not in row
    contenders["ours"] = off
    assert kernels.main(args) == 1


def test_generate_batch(load: Any, tmp_path: Path) -> None:
    """Each row's answers are held to sdpa's logits by the script itself."""
    if tuple(int(n) for n in transformers.__version__.split(".")[:2]) < (5, 20):
        pytest.skip("block tables of generate_batch, from transformers 5.20")
    script = load("generate_batch")
    assert script.main(["--small", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "generate_batch.json").read_text())
    assert [row["form"] for row in result["rows"]] == [form.name for form in script.FORMS]
    assert all(row["tokens_per_second"] > 0 and row["worst_choice"] <= 0.25 for row in result["rows"])
    prompts = script.requests(3, 4, 40, 100)
    assert [len(prompt) for prompt in prompts] == [36, 40, 44]
    assert prompts[0][:4] == prompts[1][:4] == prompts[2][:4] != prompts[0][4:8]


@pytest.mark.slow
def test_tensor_parallel(load: Any, tmp_path: Path) -> None:
    load("tensor_parallel").main(["--small", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "tensor_parallel.json").read_text())["rows"]
    assert [(row["gpus"], row["B"]) for row in rows] == [(n, B) for n in (1, 2) for B in (1, 1, 16, 16)]


def test_fresh_lengths(load: Any, tmp_path: Path) -> None:
    script = load("fresh_lengths")
    assert script.main(["--small", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "fresh_lengths.json").read_text())
    expected = [(kind, variant.name, variant.attention == "flash_attention_4") for kind, variant in script.ROWS]
    assert [(row["kind"], row["variant"], "failed" in row) for row in result["rows"]] == expected
    some = script.batches(12, 4, 64, 100, 0)
    lengths = [batch["input_ids"].shape[1] for batch in some]
    assert len(set(lengths)) == 12 and 32 < min(lengths) and max(lengths) <= 64
    for batch in some:
        rows = batch["attention_mask"].sum(1)
        assert rows[0] == batch["input_ids"].shape[1] and rows.min() >= rows[0] // 4
        assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
