"""docs/works-with.md has a row for each test that is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts import load_script

PAGE = Path(__file__).parents[2] / "docs/works-with.md"


def test_every_row_is_in_the_page(request: pytest.FixtureRequest) -> None:
    marked = {getattr(getattr(item, "function", None), "works_with", None) for item in request.session.items}
    text = PAGE.read_text(encoding="utf-8")
    missing = [row for row in marked if row and (row.what not in text or f"`{row.line}`" not in text)]
    assert missing == [], "python docs/works_with.py writes the page"


def test_every_engine_is_in_the_page_as_it_was_found() -> None:
    """`make engines`, then `python docs/works_with.py --engines`; no fault is kept."""
    page = load_script("docs/works_with.py")
    rows = json.loads(page.ENGINES.read_text(encoding="utf-8"))
    assert not [row for row in rows if row["fault"]]
    assert {row["engine"] for row in rows} >= {"vLLM", "llama.cpp", "CTranslate2", "ONNX Runtime"}
    lines, text = page.engine_lines(rows), PAGE.read_text(encoding="utf-8")
    assert [line for line in lines if line not in text] == []
    families = {row["family"] for row in rows if not row["refused"]}
    assert all(any(f" {family}" in line for line in lines) for family in families)


def test_only_the_engines_rows_are_written_anew() -> None:
    page = load_script("docs/works_with.py")
    kept = page.rows_of_tests()
    assert any(line.startswith("| vLLM | rules") for line in kept) and any("| peft | run" in line for line in kept)
    assert not any(line in kept for line in page.engine_lines(json.loads(page.ENGINES.read_text(encoding="utf-8"))))
