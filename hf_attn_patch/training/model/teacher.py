"""The teacher: the same vocabulary or none, frozen, sharded where the student is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_attn_patch.compat.transformers import whole_blocks

from .zero import autocast


def freeze(module: nn.Module) -> nn.Module:
    """In eval mode and without gradients."""
    return module.eval().requires_grad_(False)


def place_teacher(accelerator: Any, teacher: Any) -> Any:
    """On this process's device, or sharded like the student under FSDP2.

    accelerate prepares one sharded model; a second one without an optimiser is sharded here over the same mesh.
    """
    if not accelerator.is_fsdp2:
        return teacher.to(accelerator.device)
    from torch.distributed.fsdp import fully_shard

    mesh = getattr(accelerator, "torch_device_mesh", None)
    names = accelerator.parallelism_config.fsdp_dim_names if mesh is not None else ()
    options = {"mesh": mesh[tuple(names)]} if mesh is not None else {}
    blocks = whole_blocks(teacher)
    for module in teacher.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, **options)
    # the root's own weights (embeddings, head) stay whole after its forward: the loss reads the head from there
    fully_shard(teacher, **options)
    return teacher.to(accelerator.device)


class TeacherCall:
    """A teacher's objective as a function of a batch, and of how the student is about to use it."""

    def __init__(self, objective: Any, accelerator: Any) -> None:
        self.objective, self.accelerator = objective, accelerator

    @torch.no_grad()
    def __call__(self, batch: Any, mode: str = "loss") -> Any:
        """Hidden states and head for ``loss``; a Trace for ``fit``."""
        with autocast(self.accelerator):
            if mode == "fit":
                return self.objective(batch, mode="trace")
            hidden = self.objective(batch, mode="hidden")
        return hidden, self.objective.head()
