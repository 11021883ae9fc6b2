"""docs/internals.md names files and what to read in them: they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from stations import PAGES, ROOT, STATION


def defined(path: Path) -> set[str]:
    """Top-level names of a file, and those of classes as Class.name."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_stations_are_there(page: Path) -> None:
    for path, names in STATION.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), path
        missing = set(re.findall(r"`([\w.]+)`", names)) - defined(ROOT / path)
        assert not missing, (path, missing)


def test_the_walks_have_stations() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    walks = {part.split("\n", 1)[0]: part for part in text.split("\n## ")[1:]}
    assert set(walks) == {"One forward", "One weight", "One batch"}
    for walk in walks.values():
        assert len(STATION.findall(walk)) >= 8
