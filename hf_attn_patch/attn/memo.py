"""What was worked out from a tensor is kept with it, for the layers that are given the same one. One rule for all.

What is kept is found again only while it is surely still true:

- *Writes.* Tensors count the writes to them, and what was kept before a write is not found after it. Writes that the
  count misses (``.data``, NumPy, another process) are missed here as they are by autograd.
- *Inference tensors* have no such count. What comes from one holds within one forward: the layers of a model ask one
  after the other, each with a higher ``layer_idx`` and the same config. Whoever asks in any other order, from another
  model or another thread, or does not say which layer it is, works it out anew.
- *CUDA graphs* run again on whatever their inputs hold by then. While one is captured, what was kept outside is not
  found; what was kept inside holds within that forward, and is not found outside: its memory is the graph's.
- *Inference mode.* What was made in it cannot be saved for backward, so it is found in it alone.

Nothing here reads a tensor, so nothing waits for the device. Tensors of ours that go through a model (``made=True``)
are made with a count of writes even in inference mode (:func:`counted`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from hf_attn_patch.compat.torch import write_count

#: outside and inside inference mode
_ATTRIBUTES = "_hf_attn_memo", "_hf_attn_memo_of_inference"
_MOST = 64  # things kept with one tensor, which may be a static buffer
_FORMS = "_hf_attn_forms"
_NOBODY: tuple[Any, Any] = (None, None)

T = TypeVar("T")


class _Asking(threading.local):
    """Who asks in this thread: the config of the layer that called, and its index."""

    who = _NOBODY


_asking = _Asking()


def asks(module: torch.nn.Module, tracing: bool = False) -> None:
    """``module``, an attention layer, is the one that asks from here on; while torch.compile traces, nobody does."""
    if tracing:
        return
    own = module.__dict__
    _asking.who = own.get("config", type(module)), own.get("layer_idx")


def nobody_asks() -> None:
    """A call without a layer."""
    if not torch.compiler.is_compiling():
        _asking.who = _NOBODY


class _Kept:
    __slots__ = ("captured", "counted", "made", "others", "thread", "value", "version", "who")

    def __init__(self, value: Any, tensor: Tensor, others: tuple[Tensor, ...], made: bool) -> None:
        self.value, self.made = value, made
        self.version = _version(tensor)
        self.others = [(weakref.ref(other), _version(other)) for other in others]
        self.counted = (made or self.version is not None) and all(version is not None for _, version in self.others)
        self.captured = captured(tensor)
        self.who, self.thread = _asking.who, threading.get_ident()

    def still_true(self, tensor: Tensor, others: tuple[Tensor, ...]) -> bool:
        """In every layer, so what can be known once is not asked again."""
        if self.version is not None and self.version != write_count(tensor):
            return False
        if len(others) != len(self.others):
            return False
        for other, (reference, version) in zip(others, self.others):  # noqa: B905 - compared just above
            if reference() is not other or (version is not None and version != write_count(other)):
                return False
        if tensor.is_cuda:
            now = captured(tensor)
            if now != self.captured and (now or not self.made):
                return False
            if now and not self.made:
                return self._same_forward()
        return self.counted or self._same_forward()

    def _same_forward(self) -> bool:
        """Whether this call is the one that asked last, or a later layer of the same model in the same thread."""
        who, last = _asking.who, self.who
        if last is _NOBODY or self.thread != threading.get_ident():
            return False
        if who is last:
            return True
        (config, layer), (before, index) = who, last
        if config is not before or type(layer) is not int or type(index) is not int or layer <= index:
            return False
        self.who = who
        return True


def keep(tensor: Tensor, key: Any, value: Any, *others: Tensor, made: bool = False, in_any_mode: bool = False) -> None:
    """Keep ``value``, which was worked out from ``tensor`` and ``others``, with ``tensor``.

    Args:
        key: hashable: all else that it depends on.
        value: must not hold a view of ``tensor`` that autograd knows of (use ``detach()``): it would never be freed.
        made: ``tensor`` was made here, and nobody but us writes to it.
        in_any_mode: ``value`` holds nothing that was made in inference mode.
    """
    if torch.compiler.is_compiling():  # which has one copy of what is computed twice, and cannot ask for the mode
        return
    attribute = _ATTRIBUTES[not in_any_mode and torch.is_inference_mode_enabled()]
    kept: dict[Any, _Kept] | None = getattr(tensor, attribute, None)
    if kept is None or len(kept) >= _MOST:
        kept = {}
        setattr(tensor, attribute, kept)
    kept[key] = _Kept(value, tensor, others, made)


def recall(tensor: Tensor, key: Any, *others: Tensor, in_any_mode: bool = False) -> Any:
    """What :func:`keep` kept under ``key`` for the same tensors, if it is still true; else None."""
    if torch.compiler.is_compiling():
        return None
    attribute = _ATTRIBUTES[not in_any_mode and torch.is_inference_mode_enabled()]
    kept: dict[Any, _Kept] | None = getattr(tensor, attribute, None)
    if kept is None or (found := kept.get(key)) is None:
        return None
    if not others and not found.others and found.version is not None and not tensor.is_cuda:  # the commonest
        return found.value if found.version == write_count(tensor) else None
    return found.value if found.still_true(tensor, others) else None


def once(
    owner: Any, key: Hashable, make: Callable[[], T], device: torch.device | None = None, *, shared: bool = False
) -> T:
    """What ``make`` makes of a frozen ``owner``, made by who asks first, in any mode, and kept with it under ``key``.

    Args:
        owner: what it is made from; it never changes, and has a ``__dict__``.
        make: what it gives may be kept for as long as ``owner`` lives.
        device: where it lies, if it is tensors.
        shared: ``owner`` may be found outside a CUDA graph that is being captured, so nothing of the graph's memory is
            kept with it.
    """
    if torch.compiler.is_compiling():
        return make()
    kept: dict[Hashable, Any] | None = owner.__dict__.get(_FORMS)
    if kept is None:
        kept = owner.__dict__[_FORMS] = {}
    elif key in kept:
        return cast(T, kept[key])
    with counted():  # those who share it may need gradients
        made = make()
    if not (shared and device is not None and capturing(device)):
        kept[key] = made
    return made


def captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured that works on this tensor."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured that works on this device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def counted() -> AbstractContextManager[Any]:
    """Within, new tensors count the writes to them, in inference mode too. For integers and masks: it turns gradients
    on in inference mode."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else write_count(tensor)
