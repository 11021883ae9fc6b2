"""docs/works-with.md has a row for each test that is one."""

from __future__ import annotations

from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/works-with.md"


def test_every_row_is_in_the_page(request: pytest.FixtureRequest) -> None:
    marked = {getattr(getattr(item, "function", None), "works_with", None) for item in request.session.items}
    text = PAGE.read_text(encoding="utf-8")
    missing = [row for row in marked if row and (row.what not in text or f"`{row.line}`" not in text)]
    assert missing == [], "python docs/works_with.py writes the page"
