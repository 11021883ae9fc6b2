"""Running the repository's example scripts from tests."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def load_script(name: str) -> Any:
    """The script as a module, e.g. ``examples/uptrain.py``."""
    spec = importlib.util.spec_from_file_location(Path(name).stem + "_script", ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def start_script(name: str, *arguments: str) -> subprocess.Popen[str]:
    """The script in a process of its own, as a user runs it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / name), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip


def on_two(*command: str, devices: str = "cpu", timeout: float = 240) -> str:
    """What two processes of a script say, which is given ``devices`` as its last argument: by torchrun, as users do."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    if devices == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, *command, devices], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        cwd=ROOT, check=False, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout
