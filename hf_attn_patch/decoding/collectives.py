"""Collectives (all-reduce, all-gather ...) on a tape: functions of what they are given, over when they return."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from hf_attn_patch.compat.distributed import collective_name, only_waits, waited_for
from hf_attn_patch.compat.torch import schema_of


class Collective:
    """A collective as a function that writes to none of its arguments, and has its result when it returns (on a GPU:
    what the stream does next has it).

    Called with the operator's arguments; gives the tensors that the operator gives.

    Attributes:
        waits: it is nothing but the waiting, which is part of the other collectives here.
        in_place: the operator writes to the tensors of its first argument, a list.
        known: how to make a function of it is known.
        meets: see :class:`hf_attn_patch.decoding.tape.Nature`.
    """

    meets = True

    def __init__(self, func: Any, name: str, functional: bool) -> None:
        self.func = func
        self.waits = only_waits(func)
        self.in_place = not functional and name == "allreduce_"
        self.known = self.in_place or (functional and not schema_of(func).is_mutable)
        names = [argument.name for argument in schema_of(func).arguments]
        self.async_op = names.index("async_op") if "async_op" in names else None

    def __call__(self, *args: Any) -> list[Tensor]:
        if not self.in_place:
            found = self.func(*args)
            return [waited_for(t) for t in (found if isinstance(found, (list, tuple)) else [found])]
        given = [[t.clone() for t in args[0]], *args[1:]]
        if self.async_op is not None:
            given[self.async_op] = True  # else NCCL gives no work to wait for, but an empty object
        tensors, work = self.func(*given)
        work.wait()
        return list(tensors)


@functools.lru_cache(256)
def collective_of(func: Any) -> Collective | None:
    """An operator of ``torch.distributed``'s as a function, always the same one; None for other operators."""
    found = collective_name(func)
    return None if found is None else Collective(func, *found)
