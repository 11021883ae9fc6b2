"""``tp_plan="auto"`` on two GPUs with our attention, growing cache and recorded steps: the tokens of one GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decoding import build

SCRIPT = Path(__file__).parents[1] / "helpers" / "tensor_parallel_generate.py"

pytestmark = [pytest.mark.gpu, pytest.mark.gpu2]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_tokens_of_one(tmp_path: Path) -> None:
    build("llama", "cpu").save_pretrained(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    done = subprocess.run([*command, str(tmp_path), "cuda"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert f"rank {rank}: the same tokens; recorded as CUDA graphs" in done.stdout
