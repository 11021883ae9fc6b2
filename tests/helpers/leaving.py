"""How each of several processes of a test ends."""

from __future__ import annotations

import os
import runpy
import sys
from typing import NoReturn

from torch import distributed


def leave() -> NoReturn:
    """End this process when all have done their part. As Python shuts down, threads of gloo abort it now and then."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_script(path: str, *arguments: str) -> NoReturn:
    """A script as if it were started by itself; one that fails ends as it does there."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")
    leave()
