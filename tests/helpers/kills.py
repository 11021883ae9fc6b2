"""Conversions and trainings killed (SIGKILL) at random moments, then resumed until they are through.

    python tests/helpers/kills.py --kills 100 --seed 1
    python tests/helpers/kills.py --kills 30 --only uptrain

After every kill DST is absent, or whole and the same; the source and everything beside it are as they were; and what
is resumed to its end is what an undisturbed run gives, to the byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hunt import listing

ROOT = Path(__file__).parents[2]
#: conversion.json records the command as typed, and how long the last pass took
CHANGING = ("command", "seconds")


@dataclass(frozen=True)
class Job:
    """A command, its folder DST, and how it goes on after a kill."""

    name: str
    command: Callable[[Path, Path], list[str]]
    resumed: list[str]
    makes_dst: bool = False  # a folder from the start, into which its owner may look


def convert(*more: str) -> Callable[[Path, Path], list[str]]:
    return lambda world, dst: [
        sys.executable, "-m", "hf_attn_patch", "convert", str(world / "T"), str(dst), "--kv-heads", "2", "-q", *more,
    ]  # fmt: skip


def uptrain(world: Path, out: Path) -> list[str]:
    options = {
        "model": world / "S", "teacher": world / "T", "dataset": world / "text", "output": out, "tokens": 64 * 4 * 12,
        "sequence-length": 64, "batch-size": 4, "micro-batch-size": 2, "lr": 1e-3, "held-out-every": 5,
        "eval-tokens": 128, "eval-every": 4, "checkpoint-every": 2,
    }  # fmt: skip
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "examples/uptrain.py"), *given]


def has_config(folder: Path) -> bool:
    """A folder with a config is complete: it is written last, or the folder appears with it."""
    return (folder / "config.json").is_file()


JOBS = {
    job.name: job
    for job in (
        Job("mean", convert("--method", "mean"), ["--resume"]),
        Job("own text", convert("--workers", "2"), ["--resume"]),
        Job("anew", convert("--method", "aligned"), []),
        Job("uptrain", uptrain, ["--resume"], makes_dst=True),
    )
}


def make_world(folder: Path) -> Path:
    """A model T, a student S of fewer KV heads, and text."""
    from tiny import python_sources, save_tiny, tiny_llama

    save_tiny(folder / "T", tiny_llama(4))
    save_tiny(folder / "S", tiny_llama(2, seed=1, attention_dropout=0.1))
    (folder / "text").mkdir()
    for path in python_sources()[:10]:
        shutil.copy(path, folder / "text")
    return folder


def weights_and_records(folder: Path) -> dict[str, object]:
    """A finished result, without what a clock or a command line wrote into it, and without checkpoints of the way."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if name.startswith(("checkpoints", ".")) or path.name in ("README.md", "training_log.jsonl"):
            continue
        found[name] = _record(json.loads(path.read_text())) if name == "conversion.json" else path.read_bytes()
    return found


def _record(value: object) -> object:
    if isinstance(value, dict):
        return {k: _record(v) for k, v in value.items() if k not in CHANGING}
    return value


def run(command: list[str], seconds: float | None = None) -> int | None:
    """Exit code; None if the command, with all that it started, was killed after so many seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd=ROOT, start_new_session=True
    )
    try:
        _, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return None
    if process.returncode:
        raise AssertionError(f"{' '.join(command)}: exit code {process.returncode}: {err.decode()[-2000:]}")
    return 0


def disturb(job: Job, world: Path, place: Path, kills: int, draw: random.Random) -> tuple[int, int]:
    """(kills, finished runs), until there were ``kills`` of them.

    Raises:
        AssertionError: a kill, or going on after it, left what it may not.
    """
    begun = time.monotonic()
    run(job.command(world, place / "whole"))
    longest = time.monotonic() - begun
    truth = weights_and_records(place / "whole")
    source, dst = listing(world), place / "dst"
    done, finished, going = 0, 0, False
    while done < kills or going:
        # most of a run is imports: the moments after them are what may hurt
        seconds = None if done >= kills else longest * draw.uniform(0.35, 1.05)
        more = job.resumed if going else []
        ended = run(job.command(world, dst) + more, seconds)
        assert listing(world) == source, f"{job.name}: what is read was changed"
        beside = {p.name for p in place.iterdir()} - {"whole", "dst", ".dst.hf-attn"}
        assert not beside, f"{job.name}: {beside} lies beside DST"
        if ended is None:
            done += 1
            going = True
        if has_config(dst):  # also when the kill came right after the last rename
            made = weights_and_records(dst)
            differs = sorted(name for name in truth.keys() | made.keys() if truth.get(name) != made.get(name))
            assert not differs, f"{job.name}: {differs} are not what an undisturbed run gives"
            assert ended is None or not (place / ".dst.hf-attn").exists(), f"{job.name}: a work folder was left"
            finished, going = finished + 1, False
            shutil.rmtree(dst)
            shutil.rmtree(place / ".dst.hf-attn", ignore_errors=True)
        else:
            assert ended is None, f"{job.name}: exit code 0, and no DST"
            assert job.makes_dst or not dst.exists(), f"{job.name}: DST stands there half done"
    return done, finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="In all, shared out among the jobs.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=JOBS)
    given = parser.parse_args()
    jobs = [JOBS[given.only]] if given.only else list(JOBS.values())
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        world = make_world(root / "world")
        for job in jobs:
            (root / job.name).mkdir()
            share = -(-given.kills // len(jobs))
            kills, finished = disturb(job, world, root / job.name, share, random.Random(f"{given.seed}/{job.name}"))
            print(f"{job.name}: {kills} kills, {finished} runs ended as an undisturbed one", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
