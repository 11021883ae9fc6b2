"""What a run that cannot go on tells whoever started it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

#: where torchrun, and accelerate through it, want a process to leave what went wrong
#: (https://docs.pytorch.org/docs/stable/elastic/errors.html)
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def told_to_launcher(sentence: str) -> str | int:
    """What ``sys.exit`` takes to end with ``sentence``, which is left where the launcher of several processes looks.

    The launcher's own report, which comes last, then ends with the sentence instead of a link to torch's
    documentation. Processes but the main one leave it to that report: what befalls all of them is said once.
    """
    path = os.environ.get(ERROR_FILE)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        about = {"message": sentence, "extraInfo": {"py_callstack": sentence, "timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": about}))
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # the launcher ends them all as soon as one has ended: the main one speaks first
            return 1
    return sentence
