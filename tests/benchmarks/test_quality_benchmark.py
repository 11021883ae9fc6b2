"""benchmarks/quality.py: which work is handed out, what the table shows, and conversions at a toy size."""

from __future__ import annotations

import argparse
import importlib
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

ROOT = Path(__file__).parents[2]
LOSSES = {"a": 2.0, "b": 1.5, "c": 1.8}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


class FakePool:
    """Results by rule instead of training: recipe b is best."""

    def submit(self, call: Any, kind: str, *args: Any) -> Future[Any]:
        names = {
            "base": ["seed"],
            "convert": ["seed", "kv_heads", "method"],
            "uptrain": ["seed", "kv_heads", "method", "share", "distil", "recipe"],
        }[kind]
        record = dict(zip(names, args, strict=True))
        record["kind"] = {"base": "base", "convert": "untrained", "uptrain": "uptrained"}[kind]
        loss = {"base": 1.0, "untrained": 3.0}.get(record["kind"]) or LOSSES[record["recipe"]]
        record |= {"loss": loss + 0.1 * record["seed"], "seconds": 1.0, "peak_gpu_bytes": 0}
        future: Future[Any] = Future()
        future.set_result(record)
        return future


def test_other_seeds_run_what_the_first_chose(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality, report = load("quality"), load("quality_report")
    monkeypatch.setattr(quality, "corpus", lambda *_: None)
    monkeypatch.setattr(quality, "begin", lambda *_: None)
    monkeypatch.setattr(quality, "Inline", FakePool)
    options = argparse.Namespace(
        out=tmp_path, cache=tmp_path, device="cpu", compile=False, workers=0, seeds=[0, 1, 2], kv_heads=[4, 2],
        methods=["mean", "aligned"], uptrain=["aligned"], shares=[0.01], losses=["kd"], recipes=["a", "b", "c"],
        control=True, seconds=100.0,
    )  # fmt: skip
    work = quality.Work(options, replace(quality.SMALL, heads=8))
    work.run()
    runs = [
        (r["seed"], r["kv_heads"], r["method"], r["distil"], r["recipe"])
        for r in work.records
        if r["kind"] == "uptrained"
    ]
    assert len(runs) == len(set(runs))
    first = {(0, n, "aligned", True, x) for n in (4, 2) for x in "abc"} | {(0, 8, "none", False, x) for x in "abc"}
    others = {(s, n, "aligned", True, "b") for s in (1, 2) for n in (4, 2)}
    others |= {(s, 8, "none", False, "b") for s in (1, 2)}
    assert set(runs) == first | others
    lines = report.table(work.records).splitlines()
    assert lines[0].startswith("MHA: 1.100 ± 0.100")
    row = next(line for line in lines if line.startswith("| 4 | aligned |"))
    assert "1.600 ± 0.100 (75.0%)" in row  # (3 - 1.5) / (3 - 1)
    assert any("**b** (4: 1.500, 2: 1.500)" in line for line in lines)


def test_what_another_run_left_is_kept_and_not_gone_on_with(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality = load("quality")
    monkeypatch.setattr(quality, "corpus", lambda *_: None)
    monkeypatch.setattr(quality, "begin", lambda *_: None)
    monkeypatch.setattr(quality, "Inline", FakePool)
    options = argparse.Namespace(
        out=tmp_path, cache=tmp_path, device="cpu", compile=False, workers=0, seeds=[0], kv_heads=[2],
        methods=["mean"], uptrain=[], shares=[0.01], losses=["kd"], recipes=["a"], control=False, seconds=100.0,
    )  # fmt: skip
    quality.Work(options, quality.SMALL).run()
    other = argparse.Namespace(**vars(options) | {"methods": ["aligned"], "kv_heads": [4]})
    work = quality.Work(other, quality.SMALL)
    work.run()
    runs = {(r["kv_heads"], r["method"]) for r in work.records if r["kind"] == "uptrained"}
    assert runs == {(2, "mean"), (4, "aligned")}
    assert len(work.records) == 5


def test_conversions_at_a_toy_size(load: Any) -> None:
    methods, code_lm = load("quality_methods"), load("code_lm")
    torch.manual_seed(0)
    size = replace(code_lm.SMALL, hidden=32, intermediate=48, layers=2, heads=4, vocab=64, seq=16)
    model = LlamaForCausalLM(size.config()).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for p in layer.self_attn.parameters():
                p.normal_(0, 0.3)
    ids = torch.randint(0, 64, (128, 16))
    errors = {}
    for name in ("mean", "calibrated", "calibrated+refit"):
        student = methods.convert(model, 2, methods.METHODS[name], ids, 0)
        with torch.no_grad():
            x, y = (code_lm.forward(m, ids[:32])[1][-1] for m in (model, student))
        errors[name] = float((x - y).norm())
    assert errors["calibrated+refit"] < 0.9 * errors["calibrated"] < errors["mean"]
