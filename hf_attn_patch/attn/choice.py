"""The backend that a block of code insists on: for this thread and this async task, and for no other.

A context variable holds it. torch.compile can neither read nor guard one, so a value of the thread stands beside it for
compiled code, which is right wherever blocks are entered and left in order in a thread. Async tasks take turns in one
thread, so compiled code that may have to do with them asks when it runs, outside its graph.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import ContextDecorator
from contextvars import ContextVar
from types import TracebackType

import torch

from hf_attn_patch.compat.torch import in_backward

from .backends.registry import backend

#: set on layers in training while a block insists on a backend
_ASKED = "_hf_attn_asked"

#: blocks that were entered here, the innermost last: (the block, its backend, whether in an async task)
_asked: ContextVar[tuple[tuple[object, str, bool], ...]] = ContextVar("hf_attn_patch_backend", default=())


class _Traced(threading.local):
    """What compiled code reads (in the instance, where dynamo guards it)."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.tasks = 0  # blocks that async tasks of this thread are in


_traced = _Traced()


def asked_for() -> str | None:
    """The backend that the innermost block insists on, or None."""
    asked = _asked.get()
    return asked[-1][1] if asked else None


def asked_in(layer: torch.nn.Module) -> str | None:
    """:func:`asked_for` of a layer that is trained. Gradient checkpointing runs its forward once more within the
    backward, on a GPU in a thread of autograd's own, where no block was entered: then what its forward was asked."""
    asked, own = asked_for(), layer.__dict__
    if asked is None and _ASKED not in own:  # as nearly always
        return None
    if in_backward():
        remembered: str | None = own.get(_ASKED)
        return asked if remembered is None else remembered
    if asked is not None:
        own[_ASKED] = asked
    else:
        own.pop(_ASKED, None)
    return asked


def traced_for() -> str | None:
    """The same while torch.compile traces."""
    names = _traced.names
    return names[-1] if names else None


def changes_between_tasks() -> bool:
    """Whether compiled code has to ask when it runs; may be traced."""
    return _traced.tasks > 0


class use_backend(ContextDecorator):  # noqa: N801 - called like a function, used as a context manager
    """Insist on one backend for a block; it raises instead of falling back.

    The block counts where it was entered: not in other threads, nor in async tasks that were started before. Blocks may
    be nested, left in any order, and entered again; a function can be decorated. What gradient checkpointing computes
    again in the backward takes the backend that the forward took, for the layers of a model.

    Args:
        name: one of :data:`hf_attn_patch.attn.backends.registry.BACKENDS`.

    Raises:
        AttentionError: there is no such backend.

    >>> import hf_attn_patch, torch
    >>> q = torch.ones(1, 2, 3, 8)
    >>> with use_backend("reference"):
    ...     out = hf_attn_patch.attention(q, q, q)
    """

    def __init__(self, name: str) -> None:
        backend(name)
        self.name = name

    def __enter__(self) -> use_backend:
        in_task = _in_event_loop()
        _asked.set((*_asked.get(), (self, self.name, in_task)))
        _traced.tasks += in_task
        self._tell_compiled_code()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asked = _asked.get()
        mine = [i for i, (block, _, _) in enumerate(asked) if block is self]
        if mine:  # else it was entered elsewhere, in what has ended
            _asked.set(asked[: mine[-1]] + asked[mine[-1] + 1 :])
            _traced.tasks -= asked[mine[-1]][2]
            self._tell_compiled_code()

    def _tell_compiled_code(self) -> None:
        _traced.names = tuple(name for _, name, in_task in _asked.get() if not in_task)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
