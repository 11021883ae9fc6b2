"""A model's output: its tensors, and the same form with others; and the error of what has none that can be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

CACHE = object()  # stands for the cache in a result that is kept, which must not keep the cache


class UnfitError(Exception):
    """A step that cannot be recorded, with the reason."""


def reason_of(error: Exception) -> str:
    """Why a step was not recorded or not fused, in one line: an :class:`UnfitError` says it itself.

    >>> reason_of(UnfitError("it returns a set")), reason_of(KeyError("x"))
    ('it returns a set', "KeyError: 'x'")
    """
    kind = "" if isinstance(error, UnfitError) else f"{type(error).__name__}: "
    return f"{kind}{error}".split("\n")[0]


def map_output(value: Any, function: Callable[[Tensor], Tensor], old: Any, new: Any) -> Any:
    """A model's output with ``function`` of its tensors, and ``new`` for ``old``."""
    if value is old:
        return new
    if isinstance(value, Tensor):
        return function(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, ModelOutput):
        return type(value)(**{k: map_output(v, function, old, new) for k, v in value.items()})
    if type(value) in (tuple, list):
        return type(value)(map_output(v, function, old, new) for v in value)
    if type(value) is dict:
        return {k: map_output(v, function, old, new) for k, v in value.items()}
    raise UnfitError(f"it returns a {type(value).__name__}")


def tensors_of(output: Any, cache: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_output(output, lambda t: found.append(t) or t, cache, None)  # type: ignore[func-returns-value]
    return found
