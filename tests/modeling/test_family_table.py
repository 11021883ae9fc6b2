"""docs/families-tested.md: families are its rows, and nothing else that tests take as a parameter."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from zoo_cases import CASES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def family_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("family_table", HERE / "family_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_families_in_their_order(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuite>"
        '<testcase name="test_gradients_are_torchs[4]"/>'
        '<testcase name="test_compiles_as_one_graph"/>'
        '<testcase name="test_compiles_as_one_graph[opt]"/>'
        '<testcase name="test_cached_tokens_are_the_uncached_ones[greedy-sdpa-opt]"/>'
        '<testcase name="test_gradients_are_the_sums_over_each_group[gpt2]"><failure/></testcase>'
        '<testcase name="test_gradient_checkpointing_gives_the_same_gradients[gpt2]"/>'
        '<testcase name="test_generate_and_what_it_caches[gpt2]"><skipped/></testcase>'
        "</testsuite>"
    )
    module = family_table()
    lines = [line for line in module.page_of([report]).splitlines() if line.startswith("| ")]
    rows = {family: cells for family, *cells in (line.strip("| ").split(" | ") for line in lines[1:])}
    assert list(rows) == [case.stock for case in CASES]
    assert rows["opt"] == ["-", "-", "-", "-", "yes", "-", "yes"]
    assert rows["gpt2"] == ["-", "-", "-", "-", "-", "NO", "-"]
    assert set(rows["bert"]) == {"-"}


def test_the_page_is_of_the_release_that_is_tested() -> None:
    page = (ROOT / "docs/families-tested.md").read_text(encoding="utf-8")
    pins = (ROOT / "requirements/tested.txt").read_text(encoding="utf-8")
    release = re.findall(r"^transformers==(\d+\.\d+)", pins, re.MULTILINE)[0]  # of the newest Python
    assert f"(transformers {release}, CPU)" in page, "make families-tested"
