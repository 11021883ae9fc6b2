"""What accelerate's trackers are told is what the run's own log says."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import start_script
from tiny import python_sources, save_tiny, tiny_llama


def train(root: Path, tracker: str) -> Path:
    """Train for four steps, as a user starts it; the run's folder."""
    save_tiny(root / "S", tiny_llama(2))
    (root / "text").mkdir()
    for path in python_sources()[:8]:
        shutil.copy(path, root / "text")
    options = {
        "model": root / "S", "dataset": root / "text", "output": root / "out", "tokens": 64 * 2 * 4,
        "sequence-length": 64, "batch-size": 2, "held-out-every": 4, "eval-tokens": 128, "eval-every": 2,
        "checkpoint-every": 0, "log-with": tracker,
    }  # fmt: skip
    run = start_script("examples/uptrain.py", *(part for k, v in options.items() for part in (f"--{k}", str(v))))
    said = run.communicate()[0]
    assert run.returncode == 0, said
    return root / "out"


def own_log(folder: Path) -> dict[str, dict[int, float]]:
    """Value of each name at each step."""
    found: dict[str, dict[int, float]] = {}
    for line in (folder / "training_log.jsonl").open():
        entry = json.loads(line)
        step = entry.pop("step")
        for name, value in entry.items():
            found.setdefault(name, {})[step] = value
    return found


def assert_told(told: dict[str, dict[int, float]], folder: Path) -> None:
    ours = own_log(folder)
    assert {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "eval/loss"} <= ours.keys()
    assert sorted(ours["train/loss"]) == [1, 2, 3, 4]
    assert sorted(ours["eval/loss"]) == [0, 2, 4]
    assert told.keys() == ours.keys()
    for name, values in ours.items():
        assert told[name] == pytest.approx(values, rel=1e-6), name


def test_tensorboard(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = train(tmp_path, "tensorboard")
    events = accumulators.EventAccumulator(str(folder / "uptrain"))
    events.Reload()
    told = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert_told(told, folder)


READ = """
import json
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("uptrain")
print(json.dumps(SQLiteStorage.get_logs("uptrain", run)))
"""


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs trackio")
def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # trackio reads it when it is imported
    folder = train(tmp_path, "trackio")
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True)
    told: dict[str, dict[int, float]] = {}
    for entry in json.loads(done.stdout.splitlines()[-1]):
        for name, value in entry.items():
            if "/" in name:
                told.setdefault(name, {})[entry["step"]] = value
    assert_told(told, folder)
