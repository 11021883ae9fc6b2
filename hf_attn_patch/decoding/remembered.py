"""Steps in fewer kernels that a model's next call uses again instead of writing its step down anew.

What was written down holds for the same code on tensors of the same form. The tensors of a call (its inputs, the
cache's buffers, the place of the token) are put in each time; all others must be the model's own. Whether the code is
the same, :func:`code_of` says: from the modules, what stands in their attributes and configs, and the functions of
their files. It knows that only of classes of the libraries named here, whose code keeps nothing elsewhere; of other
models, each call's step is written down.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hf_attn_patch.compat.torch import own_attributes
from hf_attn_patch.compat.transformers import OF_FILES, OF_SHARDING

from .program import Program
from .tape import Tape

if TYPE_CHECKING:
    from .fusing import Fused

LIBRARIES = frozenset({"torch", "transformers", "peft", "hf_attn_patch"})
MOST = 32  # programs that are kept for one model, some hundred kilobytes of Python each
MOST_REASONS = 64
_DEEP = 6  # dicts in lists in configs ...
_PLAIN = frozenset({bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size})


class _UnknownError(Exception):
    """Something that may hold what the code depends on."""


class _The:
    """One object, which it does not keep alive."""

    __slots__ = ("ref",)

    def __init__(self, value: Any) -> None:
        try:
            self.ref = weakref.ref(value)
        except TypeError as error:
            raise _UnknownError from error

    def __eq__(self, other: object) -> bool:
        value = self.ref()
        return isinstance(other, _The) and value is not None and other.ref() is value

    __hash__ = None  # type: ignore[assignment]


def code_of(model: Any) -> list[Any] | None:
    """All that the operators of a model's step depend on, beside the form of its inputs; None where that is not known.

    Equal while nothing of it has changed: modules and their classes, their attributes, configs, weights by their place
    in memory, and the functions and classes of the files that they are from.
    """
    found: list[Any] = []
    configs: dict[int, int] = {}
    files: dict[str, None] = {}
    try:
        for name, module in model.named_modules():
            kind = type(module)
            if kind.__module__.partition(".")[0] not in LIBRARIES:
                return None
            if module is not model and (own := vars(module).get("forward")) is not None:
                if not str(getattr(own, "__module__", "")).startswith(OF_SHARDING):
                    return None
                files[own.__module__] = None
            files[kind.__module__] = None
            found += (name, _The(kind), _The(kind.forward))
            for attribute, value in own_attributes(module):
                if attribute not in OF_FILES:
                    found += (attribute, _told(value, configs, _DEEP))
    except _UnknownError:
        return None
    for file in files:
        for value in vars(sys.modules[file]).values():
            if isinstance(value, (FunctionType, type)):
                found.append(_The(value))
    return found


def _shard(value: Tensor) -> Tensor | None:
    """This process's part of a tensor that is shared out (a DTensor), without a copy; None if it is none."""
    if not hasattr(value, "to_local"):
        return None
    with torch.no_grad():
        local = value.to_local()
    return local if type(local) in (Tensor, torch.nn.Parameter) else None


def _memory(t: Tensor) -> Any:
    return t.data_ptr(), t.shape, t.stride(), t.dtype


def _told(value: Any, configs: dict[int, int], deep: int) -> Any:
    """A value that is equal to another one's where the code cannot tell them apart."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is Tensor or kind is torch.nn.Parameter:
        return value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, Tensor):
        if (shard := _shard(value)) is None:
            raise _UnknownError
        return kind, value.shape, _told(shard, configs, deep)
    if not deep:
        raise _UnknownError
    if isinstance(value, dict):
        return kind, [(key, _told(v, configs, deep - 1)) for key, v in value.items()] if value else None
    if isinstance(value, (list, tuple)):
        return kind, [_told(v, configs, deep - 1) for v in value]
    if isinstance(value, (set, frozenset)):
        return value.copy() if all(type(v) in _PLAIN for v in value) else _The(value)
    if isinstance(value, PretrainedConfig):
        if id(value) in configs:
            return configs[id(value)]
        configs[id(value)] = len(configs)
        return [(key, _told(v, configs, deep - 1)) for key, v in vars(value).items()]
    return _The(value)


@dataclasses.dataclass
class _Known:
    """Programs of a model for one state of its code."""

    code: list[Any]
    programs: dict[Any, tuple[Fused, list[int | None]]]
    moving: dict[tuple[str, ...], tuple[str, ...]] = dataclasses.field(default_factory=dict)


_known: weakref.WeakKeyDictionary[torch.nn.Module, _Known] = weakref.WeakKeyDictionary()
#: why a model's step of a kind could not be written down
_reasons: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, str]] = weakref.WeakKeyDictionary()


def any_of(model: torch.nn.Module) -> bool:
    """Whether some step of a model is remembered."""
    known = _known.get(model)
    return known is not None and bool(known.programs)


def moving_of(model: torch.nn.Module, arguments: dict[str, Any]) -> tuple[str, ...] | None:
    """Which of a step's arguments moved by one with each token, in an earlier call with arguments of these names."""
    known = _known.get(model)
    return None if known is None else known.moving.get(tuple(arguments))


def keep_moving(model: torch.nn.Module, arguments: dict[str, Any], moving: tuple[str, ...]) -> None:
    """See :func:`moving_of`; where no step is remembered, nothing is kept."""
    if known := _known.get(model):
        known.moving[tuple(arguments)] = moving


def forget(model: torch.nn.Module) -> None:
    """All that is remembered of a model."""
    _known.pop(model, None)
    _reasons.pop(model, None)


def reason_for(model: torch.nn.Module, key: Any) -> str | None:
    """Why a step of this kind was not written down before."""
    return _reasons.get(model, {}).get(key)


def keep_reason(model: torch.nn.Module, key: Any, reason: str) -> None:
    """It will not be tried again."""
    reasons = _reasons.setdefault(model, {})
    if len(reasons) >= MOST_REASONS:
        reasons.clear()
    reasons[key] = reason


def recall(model: torch.nn.Module, key: Any, tensors: Sequence[Tensor | None]) -> Fused | None:
    """A step in fewer kernels on these tensors, if one of the same form was kept and the model's code is the same."""
    known = _known.get(model)
    if known is None or key not in known.programs:
        return None
    if known.code != code_of(model):
        _known.pop(model, None)
        return None
    program = known.programs.pop(key, None)  # None: another thread has it in its hands just now
    if program is None:
        return None
    known.programs[key] = program  # the last to be forgotten
    fused, slots = program
    return fused.on({slot: tensor for slot, tensor in zip(slots, tensors, strict=True) if slot is not None})


def keep(
    model: torch.nn.Module,
    key: Any,
    fused: Fused,
    tensors: Sequence[Tensor | None],
    tape: Tape,
) -> None:
    """Remember a step, without the tensors of its call.

    Args:
        key: all that is to know of the form of the call.
        tensors: those of the call, which another call has others of.
        tape: which the step was made of.
    """
    slots: list[int | None] = [None if t is None else tape.slot_of(t) for t in tensors]
    of_call = {slot for slot in slots if slot is not None}
    known_by_code = of_call | tape.literals
    weights = [*model.parameters(), *model.buffers()]
    own = {id(t) for t in weights}
    shards = {_memory(shard) for t in weights if (shard := _shard(t)) is not None}  # each call has others of them
    program: Program = fused.program
    others = [t for slot, t in enumerate(program.first) if t is not None and slot not in known_by_code]
    if any(id(t) not in own and _memory(t) not in shards for t in others):
        return  # it reads what is neither the call's nor the model's
    code = code_of(model)
    if code is None:
        return
    known = _known.get(model)
    if known is None or known.code != code:
        known = _known[model] = _Known(code, {})
    if len(known.programs) >= MOST:
        known.programs.pop(next(iter(known.programs)), None)
    known.programs[key] = fused.on(dict.fromkeys(of_call)), slots
