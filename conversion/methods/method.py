"""What a method of merging heads is: a name, its options, and the function that makes it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_attn_patch.errors import ConversionError

if TYPE_CHECKING:
    from hf_attn_patch.conversion.families.head_layouts import AttentionWeights

Merge = Callable[["AttentionWeights"], "AttentionWeights"]


@contextlib.contextmanager
def ended(merge: Merge) -> Iterator[None]:
    """What a merge begins for all layers together, such as a bar, ends with the work, by an error too."""
    try:
        yield
    finally:
        if close := getattr(merge, "close", None):
            close()


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a method: ``--name`` on the command line, ``name=`` in Python; ``least``: of a number."""

    name: str
    help: str
    type: type = str
    default: Any = None
    least: int | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """How heads are merged.

    Attributes:
        make: "module:function" inside hf_attn_patch.conversion, called as ``function(plan, **options) -> Merge`` when
            weights are about to be touched; what it returns may have an attribute ``record`` (a dict for
            conversion.json).
        scope: "kv": gets a tensor's K or V heads at a time; "layer": gets Q, K, V and O of a layer together.
        ordered: the layers are given one after another, from the first on.
        exact: the same inputs give the same bits, so that ``verify`` can recompute and compare.
    """

    name: str
    summary: str
    make: str
    scope: Literal["kv", "layer"] = "kv"
    options: tuple[Option, ...] = ()
    ordered: bool = False
    exact: bool = True
    runs: bool = False

    def build(self, plan: Any, options: Mapping[str, Any]) -> Merge:
        module, name = self.make.split(":")
        factory = getattr(importlib.import_module(f"hf_attn_patch.conversion.{module}"), name)
        merge: Merge = factory(plan, **options)
        return merge

    def resolve(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options in full; :class:`ConversionError` for one that is none of them, or too small a number."""
        known = {option.name: option.default for option in self.options}
        least = {option.name: option.least for option in self.options if option.least is not None}
        for name, value in options.items():
            if name not in known:
                raise ConversionError(
                    f"method {self.name!r} has no option --{name.replace('_', '-')} ({value!r})"
                    + ("; a calibration text is for method calibrated" if name.startswith("calibrat") else "")
                )
            if value is not None and name in least and value < least[name]:
                raise ConversionError(f"--{name.replace('_', '-')} {value}: give at least {least[name]}")
            known[name] = value
        return known
