"""Private names of torch.distributed: the operators behind its collectives (torch 2.11 to 2.13)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .torch import schema_of

_FUNCTIONAL = "_c10d_functional"


@functools.lru_cache(256)
def collective_name(operator: Any) -> tuple[str, bool] | None:
    """The name of an operator by which processes meet, and whether it gives new tensors that are to be waited for
    (``functional``), rather than work that writes to its first argument; None for other operators.

    >>> collective_name(torch.ops.aten.mm.default) is None
    True
    """
    space, _, name = schema_of(operator).name.partition("::")
    return (name, space == _FUNCTIONAL) if space in ("c10d", _FUNCTIONAL) else None


def only_waits(operator: Any) -> bool:
    """Whether an operator only waits for what a functional collective gave, or wraps it until somebody does."""
    return collective_name(operator) in (("wait_tensor", True), ("_wrap_tensor_autograd", True))


def waited_for(tensor: Tensor) -> Tensor:
    """What a functional collective gave, once it is there (on a GPU: for what the stream does next)."""
    found: Tensor = torch.ops._c10d_functional.wait_tensor(tensor)
    return found
