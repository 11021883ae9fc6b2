"""Tensors that lie on several processes (DTensor): kernels take what lies on this one."""

from __future__ import annotations

import sys
from typing import Any

from hf_attn_patch.errors import AttentionError


def refuse_distributed(q: Any) -> None:
    """See that ``q`` lies on this process.

    Raises:
        AttentionError: it is a DTensor.
    """
    module = sys.modules.get("torch.distributed.tensor")  # else there are none
    if module is not None and isinstance(q, module.DTensor):
        raise AttentionError(
            f"query is a DTensor ({', '.join(map(str, q.placements))}), and kernels take what lies on one process: "
            "where heads or rows are sharded give q.to_local(), k.to_local() and v.to_local(); sharded sequences are "
            "for a model of transformers under context_parallel"
        )
