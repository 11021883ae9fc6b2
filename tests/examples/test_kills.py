"""A few kills at random moments; `python tests/helpers/kills.py --kills 100` is the long form."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from kills import JOBS, disturb, make_world

#: test_uptrain.py kills a training each time
LONGER = [pytest.param(name, 4, marks=pytest.mark.slow) for name in ("own text", "uptrain")]


@pytest.mark.parametrize(("name", "kills"), [("own text", 1), *LONGER])
def test_killed_at_random_moments(name: str, kills: int, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    (tmp_path / "place").mkdir()
    done, finished = disturb(JOBS[name], world, tmp_path / "place", kills, random.Random(f"0/{name}"))
    assert done == kills and finished
