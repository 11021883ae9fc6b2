"""torch's context parallelism (``torch.distributed.tensor.experimental.context_parallel``), which accelerate uses: each
process holds a part of every sequence, and ``scaled_dot_product_attention`` is replaced by one that knows of it."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch.nn import functional

from .ground import known

#: torch's own attention, whatever stands in its place meanwhile
own_attention = torch._C._nn.scaled_dot_product_attention
#: (output of all, input of one) and (output of one, input of all), flat; by their names since torch 2.13, and before
all_gather: Any = getattr(distributed, "all_gather_single", None)
reduce_scatter: Any = getattr(distributed, "reduce_scatter_single", None)
if all_gather is None:
    all_gather = getattr(distributed, "all_gather_into_tensor", None)
    reduce_scatter = getattr(distributed, "reduce_scatter_tensor", None)
_MODULE = "torch.distributed.tensor.experimental._context_parallel._attention"


class Split(NamedTuple):
    """How sequences are shared out: to ``size`` processes of ``group``, of which this is number ``rank``.

    ``balanced``: each holds a chunk of the first half and its mirror image of the second, so all have as much to do.
    """

    group: Any
    rank: int
    size: int
    balanced: bool


@torch.compiler.disable
def context_parallel() -> Split | None:
    """How sequences are shared out right now; None outside of ``context_parallel`` (torch 2.11 to 2.14)."""
    if functional.scaled_dot_product_attention is own_attention or _MODULE not in sys.modules:
        return None  # as it nearly always is, or somebody else replaced it
    return _split(functional.scaled_dot_product_attention)


@known("torch", "what context_parallel puts in scaled_dot_product_attention's place (_replaced_functions, device_mesh)")
def _split(replacement: Any) -> Split | None:
    module = sys.modules[_MODULE]
    if replacement not in module._replaced_functions:
        return None
    kept = dict(zip(replacement.__code__.co_freevars, replacement.__closure__ or (), strict=False))
    mesh = kept["device_mesh"].cell_contents
    balanced = bool(module._cp_options.enable_load_balance)
    return Split(mesh.get_group(), mesh.get_local_rank(), mesh.size(), balanced)
