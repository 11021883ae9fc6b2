"""The backends by name: ours, and those that other packages add."""

from __future__ import annotations

from collections.abc import Callable

from hf_attn_patch.errors import AttentionError
from hf_attn_patch.handle import Handle

from . import flash2, flash3, flash4, flex, reference, torch_sdpa, torch_varlen, triton_bias, triton_decode
from .base import Backend

_ours: dict[str, Backend] = {
    "flash4": flash4,
    "flash3": flash3,
    "flash2": flash2,
    "triton_decode": triton_decode,
    "triton_bias": triton_bias,
    "torch_sdpa": torch_sdpa,
    "torch_varlen": torch_varlen,
    "flex": flex,
    "reference": reference,
}
#: the names of our own
BACKENDS = tuple(_ours)

_all: dict[str, Backend] = dict(_ours)
_before: dict[str, str] = {}
_listeners: list[Callable[[], None]] = []


def names() -> tuple[str, ...]:
    """All names: ours, then those that were registered, in their order."""
    return tuple(_all)


def backend(name: str) -> Backend:
    """The backend of this name.

    Raises:
        AttentionError: there is none.
    """
    if name not in _all:
        raise AttentionError(f"there is no backend {name!r}; choose one of {', '.join(_all)}")
    return _all[name]


def register(name: str, new: Backend, *, before: str = "reference") -> Handle:
    """Add a backend: it can be asked for by name, is tried with the others, and is listed where they are.

    Args:
        name: what it is called.
        new: a module or object that keeps :class:`~hf_attn_patch.attn.backends.base.Backend`.
        before: the backend before which it is tried, for every kind of request.

    Returns:
        a handle that takes it away again; also a context manager.

    Raises:
        AttentionError: the name is taken, there is no backend ``before``, or ``new`` lacks a function.

    >>> from types import SimpleNamespace
    >>> import torch, hf_attn_patch
    >>> def run(q, k, v, request, operands):
    ...     return torch.zeros(*q.shape[:-1], v.shape[-1]), None
    >>> zeros = SimpleNamespace(missing=lambda: None, refuses=lambda request: None, run=run)
    >>> q = torch.ones(1, 2, 3, 8)
    >>> with register("zeros", zeros):
    ...     hf_attn_patch.attention(q, q, q, backend="zeros").sum()
    tensor(0.)
    """
    if name in _all:
        raise AttentionError(f"there is a backend {name!r} already; register this one under another name")
    backend(before)
    lacking = [what for what in ("missing", "refuses", "run") if not callable(getattr(new, what, None))]
    if lacking:
        raise AttentionError(
            f"backend {name!r} has no function {', '.join(lacking)}; "
            "hf_attn_patch.attn.backends.base.Backend says what a backend has"
        )
    _all[name] = new
    _before[name] = before
    _tell()

    def unregister() -> None:
        del _all[name], _before[name]
        for other, place in _before.items():
            if place == name:  # what was tried before it goes where it was
                _before[other] = before
        _tell()

    return Handle(unregister)


def with_registered(order: tuple[str, ...]) -> tuple[str, ...]:
    """An order of ours with the registered backends in their places."""
    if not _before:
        return order
    found = list(order)
    for name, place in _before.items():
        found.insert(found.index(place), name)
    return tuple(found)


def when_changed(listener: Callable[[], None]) -> None:
    """Call this after every change: what was chosen among the backends may be another choice now."""
    _listeners.append(listener)


def _tell() -> None:
    for listener in _listeners:
        listener()
