"""Private names of transformers, and of accelerate as transformers uses it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from .ground import changed, known


@known("transformers", "where a config keeps its attention implementation (PreTrainedConfig._attn_implementation)")
def attention_name(config: Any) -> str | None:
    """The attention implementation that a config asks for."""
    name: str | None = config._attn_implementation
    return name


@known("transformers", "where a config keeps its attention implementation (PreTrainedConfig._attn_implementation)")
def set_attention_name(config: Any, name: str) -> None:
    """Ask for another implementation in this config alone, without the checks of ``set_attn_implementation``."""
    config._attn_implementation  # noqa: B018 - gone: an error, not a new attribute that nobody reads
    config._attn_implementation = name


@known("transformers", "PreTrainedModel._can_set_attn_implementation")
def goes_through_interface(model: Any) -> bool:
    """Whether a model's (or a model class's) own modeling file asks the attention interface."""
    return bool(model._can_set_attn_implementation())


@known("transformers", "the table of AttentionInterface (_global_mapping)")
def global_functions(interface: Any) -> dict[str, Callable[..., Any]]:
    """The process-wide table of ``AttentionInterface`` or ``AttentionMaskInterface``: name -> function."""
    table: dict[str, Callable[..., Any]] = interface._global_mapping
    return table


@known("transformers", "how models name the blocks that stay whole (_no_split_modules)")
def whole_blocks(model: Any) -> set[str]:
    """The class names of a model's blocks, as it and its sub-models name them for device maps; empty if it names none.

    A class holds a list or None, a model of 5.17 and later a set of its own and its sub-models' names.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return set(model._no_split_modules or ())
    return set(getattr(model, "_no_split_modules", None) or ())  # a wrapper may pass a model's on


@known("transformers", "the table of an Auto class (_model_mapping)")
def auto_table(auto_class: Any) -> Any:
    """The mapping of an Auto class, config class -> model class; None for what is no Auto class of models."""
    return getattr(auto_class, "_model_mapping", None)


@known("transformers", "PreTrainedModel._from_config")
def model_from_config(model_class: Any, config: Any, **options: Any) -> Any:
    """A model with new weights, as ``AutoModel.from_config`` makes one, of a class that is known."""
    return model_class._from_config(config, **options)


class _NoCollector:
    """Stands for transformers' collector where there is none: nothing is collected."""

    compiling = False

    def get(self) -> None:
        return None


def output_collector() -> Any:
    """What tells whether transformers' hooks collect attention weights in the forward that runs: ``get()`` gives the
    outputs that are collected, by name, or None, and ``compiling`` is true inside such a forward that is traced.

    Known for transformers 5.17 to 5.24. Where it is gone, ``output_attentions=True`` cannot be served: a warning says
    so, once, and everything else works.
    """
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        _active_collector = None
    if hasattr(_active_collector, "get") and hasattr(_active_collector, "compiling"):
        return _active_collector
    error = changed("transformers", "how outputs are captured (output_capturing._active_collector)")
    warnings.warn(f"output_attentions=True gives no attentions: {error}", RuntimeWarning, stacklevel=2)
    return _NoCollector()


@known("accelerate", "where it keeps a module's hook (_hf_hook)")
def has_accelerate_hook(module: Any) -> bool:
    """Whether accelerate's device maps or offloading work on this module."""
    return "_hf_hook" in vars(module)
