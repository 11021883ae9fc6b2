"""One of several processes that convert together: each line of a file is a conversion, done in order.

    RANK=0 WORLD_SIZE=2 ... python convert_together.py CASES.jsonl

A case has ``command`` (arguments of ``hf-attn``), and may have ``trouble``: what befalls process 1 before its second
layer ("error", "fault", "killed" or "stopped"), and ``timeout`` in seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from leaving import leave

from hf_attn_patch.cli import main
from hf_attn_patch.conversion import ConversionError, processes
from hf_attn_patch.conversion.calibration.calibrated import Calibrated

_step = Calibrated.step


def _troubled(kind: str) -> Any:
    def step(self: Calibrated) -> None:
        if processes.current().number == 1 and self.number == 1:
            if kind == "error":
                raise ConversionError("layer 1 is not to my taste")
            if kind == "fault":
                raise KeyError("nobody expected this")
            os.kill(os.getpid(), signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        _step(self)

    return step


def run(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        Calibrated.step = _troubled(case["trouble"]) if "trouble" in case else _step  # type: ignore[method-assign]
        if "timeout" in case:
            processes.TIMEOUT = timedelta(seconds=case["timeout"])
        main(case["command"], prog_name="hf-attn", standalone_mode=False)


if __name__ == "__main__":
    run([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()])
    leave()
