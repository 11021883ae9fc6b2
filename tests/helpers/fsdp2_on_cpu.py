"""Run a script under FSDP2 on CPU processes (gloo), which torch can and accelerate does not offer.

    python -m torch.distributed.run --nproc_per_node 2 tests/helpers/fsdp2_on_cpu.py SCRIPT ARGUMENT...

All but the choice of FSDP2 is accelerate's own code: its plugin, its preparing, its checkpoints.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from leaving import run_script


def main() -> None:
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    os.environ["FSDP_VERSION"] = "2"
    prepare = AcceleratorState.__init__
    plugins: list[Any] = []

    def with_fsdp2(self: Any, *arguments: Any, **named: Any) -> None:
        prepare(self, *arguments, **named)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if not plugins:
                plugins.append(FullyShardedDataParallelPlugin(
                    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
                    state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False,
                ))  # fmt: skip
                if self._mixed_precision != "no":
                    plugins[0].set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugins[0]

    AcceleratorState.__init__ = with_fsdp2
    run_script(*sys.argv[1:])


if __name__ == "__main__":
    main()
