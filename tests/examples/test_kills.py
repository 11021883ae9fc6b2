"""A few kills at random moments; `python tests/helpers/kills.py --kills 100` is the long form."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from kills import JOBS, disturb, make_world


@pytest.mark.parametrize("name", ["own text", "uptrain"])
def test_killed_at_random_moments(name: str, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    (tmp_path / "place").mkdir()
    kills, finished = disturb(JOBS[name], world, tmp_path / "place", 2, random.Random(f"0/{name}"))
    assert kills == 2 and finished
