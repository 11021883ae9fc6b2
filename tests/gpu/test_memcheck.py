"""Our decoding kernels under compute-sanitizer: no byte beyond a tensor is read or written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kernel_calls
import pytest

CHECKER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def test_the_calls_are_right() -> None:
    """Also in the interpreter, where there is no GPU."""
    kernel_calls.all_calls()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(CHECKER is None, reason="compute-sanitizer is not installed")
def test_no_byte_beyond_a_tensor() -> None:
    calls = Path(kernel_calls.__file__)
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else torch's pool hides the ends of tensors
    command = [str(CHECKER), "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(calls)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
    assert "all calls are right" in done.stdout
