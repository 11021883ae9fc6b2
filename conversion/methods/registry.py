"""The methods by name. A method is a function from :class:`AttentionWeights` to :class:`AttentionWeights`.

To add one: write the function (or a class with ``__call__``) in a file of its own and add a :class:`Method` to
:data:`METHODS`; options of its own are :class:`Option` entries, which the command line shows by themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_attn_patch.errors import ConversionError

if TYPE_CHECKING:
    from hf_attn_patch.conversion.families.head_layouts import AttentionWeights
    from hf_attn_patch.conversion.planner import Plan

Merge = Callable[["AttentionWeights"], "AttentionWeights"]


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a method: ``--name`` on the command line, ``name=`` in Python."""

    name: str
    help: str
    type: type = str
    default: Any = None


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

    def build(self, plan: Plan, options: Mapping[str, Any]) -> Merge:
        module, name = self.make.split(":")
        factory = getattr(importlib.import_module(f"hf_attn_patch.conversion.{module}"), name)
        merge: Merge = factory(plan, **options)
        return merge

    def resolve(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options in full; :class:`ConversionError` for one that this method does not have."""
        known = {option.name: option.default for option in self.options}
        for name, value in options.items():
            if name not in known:
                raise ConversionError(
                    f"method {self.name!r} has no option --{name.replace('_', '-')} ({value!r})"
                    + ("; a calibration text is for method calibrated" if name.startswith("calibrat") else "")
                )
            known[name] = value
        return known


GROUP = Option("group", "which heads go together: adjacent or similar")

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("mean", "the mean of each group's heads (the GQA paper)", "methods.mean:mean"),
        Method("first", "the first head of each group", "methods.mean:first"),
        Method("random", "new heads, drawn anew with --seed (the paper's control)", "methods.mean:random"),
        Method("mean-norm", "the mean, scaled back to the heads' mean norm", "methods.mean:mean_norm"),
        Method(
            "aligned",
            "heads turned into a common basis first; changes Q and O too",
            "methods.aligned:aligned",
            scope="layer",
            options=(GROUP,),
        ),
        Method(
            "calibrated",
            "aligned by what layers read on a calibration text, then fitted to the original layer by layer",
            "calibration.calibrated:calibrated",
            scope="layer",
            options=(
                Option("calibrate", "calibration text: a file, JSONL, Parquet, a folder or a data set's id"),
                Option("calibration_tokens", "tokens of calibration text  (default 500000)", int, 500_000),
                Option(
                    "calibration_length",
                    "tokens of a calibration sequence  (default 1024, encoder-decoders 512, encoders: a paragraph)",
                    int,
                ),
                Option("refit", "fit every layer to the original's after the merge  (default: yes)", bool, True),
                GROUP,
                Option("device", "where layers are fitted, such as cuda or cpu  (default: a GPU if there is one)"),
            ),
            ordered=True,
            exact=False,
        ),
    )
}

#: the best that can be done with what is given: ``calibrated`` with a calibration text, ``aligned`` without
AUTO = "auto"
#: where no method is named
DEFAULT = AUTO


def method_named(name: str | None, options: Mapping[str, Any]) -> Method:
    """The method of this name; what ``auto`` is depends on whether there is a calibration text among the options.

    None: ``auto``.

    Raises:
        ConversionError: there is none.
    """
    if name is None:
        name = DEFAULT
    if name == AUTO:
        name = "calibrated" if options.get("calibrate") else "aligned"
    if name not in METHODS:
        raise ConversionError(f"there is no method {name!r}; choose one of {AUTO}, {', '.join(METHODS)}")
    if name == "calibrated" and not options.get("calibrate"):
        raise ConversionError("method 'calibrated' needs a calibration text: --calibrate TEXT")
    return METHODS[name]


def all_options() -> dict[str, Option]:
    """Every option of any method, by name."""
    return {option.name: option for method in METHODS.values() for option in method.options}
