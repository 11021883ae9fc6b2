"""Damaged checkpoints, records and texts from a seed, 600 (-m slow: 2,000); the hunt sees what it looks for."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hunt
import pytest
from hunt_cases import DST, KINDS, SECRET, Case
from scripts import ROOT


@pytest.mark.parametrize("cases", [600, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_damage_costs_more_than_a_sentence(cases: int) -> None:
    """In a process of its own, whose children are limited; see tests/helpers/hunt.py for what is held."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "tests/helpers/hunt.py", "--cases", str(cases)], capture_output=True, text=True,
        env=environment, cwd=ROOT, timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    counts = [int(line.split(": ")[1].split()[0]) for line in done.stderr.splitlines() if " cases, " in line]
    assert len(counts) == len(KINDS) and sum(counts) >= cases


def case_of(folder: Path, command: Callable[[], object]) -> Case:
    (folder / "seeds" / "llama").mkdir(parents=True)
    (folder / "case").mkdir()
    case = Case(random.Random(0), folder / "seeds", folder / "case")
    case.bring("llama")
    case.call(command)
    return case


def copies_the_secret(folder: Path) -> None:
    (folder / DST).mkdir()
    (folder / DST / "x").write_bytes(b"--" + SECRET)


def spins() -> None:
    try:
        while True:
            sum(range(1000))
    except Exception:  # which the hunt's own interruption must not be
        return


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (lambda folder: [][0], "IndexError"),
        (lambda folder: (folder / "other" / "mine.txt").write_text("x"), "touched ['other/mine.txt']"),
        (lambda folder: (folder / "src" / "new").mkdir(), "touched ['src/new']"),
        (copies_the_secret, "copied what lies outside"),
        (lambda folder: len(bytearray(600 << 20)), "MB"),
        (lambda folder: spins(), "took too long"),
    ],
    ids=["an error", "a foreign file", "the source", "a secret", "memory", "time"],
)
def test_the_hunt_sees(
    command: Callable[[Path], object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hunt, "SECONDS", 0.5)
    found = hunt.complaints(case_of(tmp_path, lambda: command(tmp_path / "case")), tmp_path / "case")
    assert words in "".join(found)


def test_the_hunt_sees_a_process_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hunt, "one", lambda name, number, seed, seeds: os._exit(9) if number == 3 else [])
    found = hunt.batch("configs", range(5), 0, tmp_path / "seeds")
    assert list(found) == ["configs:3"] and "ended with status" in found["configs:3"][0]


def test_a_case_is_the_same_every_time(tmp_path: Path) -> None:
    from mutations import CONFIG_KEYS, dumped, mutate_json

    def made(seed: int) -> bytes:
        draw = random.Random(f"{seed}/configs/7")
        return dumped(draw, mutate_json(draw, {"num_hidden_layers": 2, "layer_types": ["a", "b"]}, CONFIG_KEYS))

    begun = time.process_time()
    assert made(1) == made(1)
    assert len({made(seed) for seed in range(50)}) > 40
    assert time.process_time() - begun < 5
