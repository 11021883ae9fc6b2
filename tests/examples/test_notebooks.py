"""The notebooks of ``examples/notebooks`` run from top to bottom, on tiny stand-ins for their models."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import stand_ins
from scripts import ROOT

NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))
#: notebook -> what takes the place of its cell "parameters" (papermill's way), so that it is done in seconds
SMALLER: dict[str, dict[str, Any]] = {
    "switch": {"NEW_TOKENS": 4},
    "convert": {"KV_HEADS": [8, 4], "CONTEXT": 64},
    "uptrain": {"TOKENS": "1024", "SEQUENCE": 64, "BATCH": 4, "LOG_EVERY": 1},
    "answers": {"ANSWERS": 3, "NEW_TOKENS": 4, "PROMPT_TOKENS": 200},
}


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def without_installing(source: str) -> str:
    """A cell without its lines for pip, which are the only ones that are no Python."""
    lines = source.splitlines()
    assert all(line.startswith("%pip install ") for line in lines if line.startswith(("%", "!")))
    return "\n".join("" if line.startswith("%") else line for line in lines)


def run(source: str, where: str, namespace: dict[str, Any]) -> Any:
    """Execute a cell; what its last expression is, as a notebook would show it."""
    tree = ast.parse(source)
    last = None
    if tree.body and isinstance(end := tree.body[-1], ast.Expr):
        last = ast.Expression(end.value)
        del tree.body[-1]
    exec(compile(tree, where, "exec"), namespace)
    return None if last is None else eval(compile(last, where, "eval"), namespace)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-ins")
    stand_ins(folder)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(
    path: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in models.iterdir():
        (tmp_path / name.name).symlink_to(name)
    monkeypatch.chdir(tmp_path)
    for key, value in {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(key, value)
    namespace: dict[str, Any] = {"__name__": "__notebook__"}
    shown = []
    for number, cell in enumerate(cells(path)):
        if cell["cell_type"] != "code":
            continue
        shown.append(run(without_installing("".join(cell["source"])), f"{path.name}, cell {number}", namespace))
        if "parameters" in cell["metadata"].get("tags", ()):
            unknown = SMALLER[path.stem].keys() - namespace.keys()
            assert not unknown, f"{path.name} has no parameters {unknown}"
            namespace |= SMALLER[path.stem]
            if "REPOSITORY" in namespace:
                namespace["REPOSITORY"] = os.fspath(ROOT)
    printed = capfd.readouterr().out
    check = {"switch": switch, "convert": convert, "uptrain": uptrain, "answers": answers}[path.stem]
    check(namespace, [x for x in shown if x is not None], printed)


def switch(seen: dict[str, Any], shown: list[Any], printed: str) -> None:
    assert seen["before"].tolist() == seen["after"].tolist() and seen["before"].shape[1] > 4
    assert seen["difference"] < 1e-3 and "largest difference" in printed
    assert "triton_decode" in shown[-1]._repr_html_()


def convert(seen: dict[str, Any], shown: list[Any], printed: str) -> None:
    assert "KV" in shown[0]._repr_html_()
    assert len(seen["found"]) == 5 and any(x is seen["found"] for x in shown)
    sizes = {e.model: e.kv_bytes_per_token for e in seen["found"]}
    assert sizes["converted-8-mean"] == sizes["converted-8-calibrated"] == sizes[seen["MODEL"]] / 4
    assert Path("what-was-lost.png").stat().st_size > 5000


def uptrain(seen: dict[str, Any], shown: list[Any], printed: str) -> None:
    assert len(seen["steps"]) >= 4 and Path("uptraining.png").stat().st_size > 5000
    assert [Path(e.model).name for e in shown[-1]][-2:] == [seen["STUDENT"], seen["OUTPUT"]]
    assert (Path(seen["OUTPUT"]) / "config.json").is_file()


def answers(seen: dict[str, Any], shown: list[Any], printed: str) -> None:
    assert seen["answers"].shape[0] == seen["apart"].shape[0] == 3
    assert seen["same"] == 3, "the stand-in has no two words within rounding"
    assert "3 of 3 answers are equal" in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_as_a_reader_gets_it(path: Path) -> None:
    """A notebook of version 4.5 with a title, no stale outputs, an installation, and parameters in one place."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5) and path.stem in SMALLER
    found = whole["cells"]
    assert len({cell["id"] for cell in found}) == len(found)
    assert found[0]["cell_type"] == "markdown" and found[0]["source"][0].startswith("# ")
    assert found[1]["source"][0].startswith("%pip install -q ") and "hf-attn-patch" in found[1]["source"][0]
    assert [cell["metadata"].get("tags") for cell in found].count(["parameters"]) == 1
    for cell in found:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
