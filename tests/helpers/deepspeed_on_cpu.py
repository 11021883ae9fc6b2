"""Run a script under DeepSpeed on CPU processes (gloo), which DeepSpeed can and accelerate does not offer.

    accelerate launch --config_file examples/accelerate/deepspeed_zero2.yaml --mixed_precision no \
        tests/helpers/deepspeed_on_cpu.py SCRIPT ARGUMENT...

All but the choice of DeepSpeed is accelerate's own code: its launcher, its plugin, its preparing, its checkpoints.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from leaving import run_script


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    prepare = AcceleratorState.__init__

    def with_deepspeed(self: Any, *arguments: Any, **named: Any) -> None:
        first = not AcceleratorState._shared_state
        prepare(self, *arguments, **named)
        if first:  # what the two classes do on a GPU
            assert self.distributed_type == DistributedType.MULTI_CPU
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.DEEPSPEED
            plugin = self.deepspeed_plugins = named["deepspeed_plugin"]
            plugin.set_mixed_precision(self._mixed_precision)
            plugin.select(_from_accelerator_state=True)

    AcceleratorState.__init__ = with_deepspeed
    run_script(*sys.argv[1:])


if __name__ == "__main__":
    main()
