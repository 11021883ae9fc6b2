"""A run's numbers: to accelerate's trackers, and to a JSONL file beside the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class RunLog:
    """One JSON object per line in ``path``; a resumed run drops what a killed one wrote after its checkpoint."""

    def __init__(self, accelerator: Any, path: Path) -> None:
        self.accelerator, self.path = accelerator, path

    def start(self, step: int) -> None:
        """Keep the lines up to ``step``."""
        if not self.accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() and step else []
        # a kill may have cut the last line short
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, values: dict[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
