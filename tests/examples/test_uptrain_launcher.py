"""What a user of `accelerate launch` reads last is our sentence, with one process and with two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ROOT

from hf_attn_patch.training import told_to_launcher

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--config_file"]


@pytest.mark.parametrize(
    ("config", "arguments", "sentence"),
    [
        ("cpu.yaml", ["--nonsense", "3"], "uptrain: there is no option --nonsense 3; --help lists all"),
        ("ddp.yaml", ["--model", "m"], "uptrain: --dataset must be given"),
    ],
    ids=["one process", "two processes"],
)
def test_the_last_line_is_our_sentence(config: str, arguments: list[str], sentence: str) -> None:
    command = [*LAUNCH, f"examples/accelerate/{config}", "--mixed_precision", "no", "examples/uptrain.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip("=- ")]
    assert lines[-1].removeprefix("traceback : ") == sentence, done.stderr
    assert config != "cpu.yaml" or "Traceback" not in done.stderr
    assert done.stderr.partition("Traceback")[0].count(sentence) == 1  # and not once a process


def test_what_is_left_for_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    path = tmp_path / "attempt_0" / "error.json"
    assert told_to_launcher("a sentence") == "a sentence"  # nobody asked
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert told_to_launcher("a sentence") == "a sentence"
    monkeypatch.setenv("RANK", "1")
    path.unlink()
    assert told_to_launcher("a sentence") == 1  # for sys.exit: the launcher says it
    assert json.loads(path.read_text())["message"]["message"] == "a sentence"
    report = str(ChildFailedError("script", {0: ProcessFailure(0, 1, 1, str(path))}))
    assert [line for line in report.splitlines() if line.strip("=- ")][-1].strip() == "traceback : a sentence"
