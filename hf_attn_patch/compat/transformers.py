"""Private names of transformers, and of accelerate as transformers uses it."""

from __future__ import annotations

import importlib
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
def set_attention_name(config: Any, name: str | None) -> None:
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


#: attributes in which ``from_pretrained`` leaves a model how its weights are called in files (5.17 to 5.24); no forward
#: reads them
OF_FILES = frozenset({"_weight_conversions"})
#: how the modules' names begin whose functions stand before the forwards of modules with a part of their weights
#: (``tp_plan``; 5.17, 5.24): what they do depends on nothing that changes
OF_SHARDING = ("transformers.integrations.tensor_parallel", "transformers.distributed.")


@known("transformers", "the names of a model's tied weights (_tied_weights_keys)")
def tied_names(model: Any) -> set[str]:
    """The weights that a model shares with others and that its checkpoints leave out."""
    return set(model._tied_weights_keys or ())


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


def captures_outputs(hook: Any) -> bool:
    """Whether a module's hook is one of transformers' output capturing (5.17 to 5.24), which does nothing by itself.

    Taken for another one where they move: what asks then treats the module as hooked.
    """
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


@known("transformers", "the tables of the Auto classes (modeling_auto, _model_mapping)")
def auto_model_classes() -> dict[str, Any]:
    """transformers' Auto classes of models, by name."""
    from transformers.models.auto import modeling_auto

    found = {name: value for name, value in vars(modeling_auto).items() if is_auto_class(value)}
    found["AutoModel"]  # gone: the tables are elsewhere
    return found


def is_auto_class(value: Any) -> bool:
    """Whether a class is an Auto class of models: it has a table (transformers 5.17 to 5.24)."""
    return isinstance(value, type) and getattr(value, "_model_mapping", None) is not None


@known("transformers", "the table of an Auto class (_model_mapping)")
def classes_of(auto_class: Any, config: Any) -> tuple[Any, ...]:
    """The model classes that an Auto class has for a config, the one that it prefers first; empty if it has none."""
    try:
        found = auto_class._model_mapping.get(type(config), ())
    except ValueError:  # a name in the table whose class its module does not export (VoxtralRealtimeTextModel)
        return ()
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


@known("transformers", "the table of names of an Auto class (_model_mapping._model_mapping)")
def class_names_of(auto_class: Any, model_type: str) -> tuple[str, ...]:
    """The names of the model classes that an Auto class has for a model type, without importing them."""
    found = auto_class._model_mapping._model_mapping.get(model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)


@known("transformers", "the table of config classes (CONFIG_MAPPING_NAMES)")
def config_class_names() -> dict[str, str]:
    """transformers' own table, model type -> name of the config class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return CONFIG_MAPPING_NAMES  # type: ignore[no-any-return]


@known("transformers", "the table of config classes (CONFIG_MAPPING)")
def add_config_class(model_type: str, name: str, module: Any) -> None:
    """Let ``AutoConfig`` find the config class ``name`` of a new model type in ``module``, once it is asked for."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class_names()[model_type] = name
    CONFIG_MAPPING._modules[model_type] = module


@known("transformers", "the tables of the Auto classes (auto_factory._LazyAutoMapping)")
def add_like(file: str, stock: str, model_type: str, module: Any, rename: Callable[[Any], Any]) -> None:
    """Give each table in one of ``transformers.models.auto``'s files an entry for a new model type wherever it has one
    for a stock type: the stock entry renamed, to be found in ``module``."""
    from transformers.models.auto.auto_factory import _LazyAutoMapping

    for table in list(vars(importlib.import_module(f"transformers.models.auto.{file}")).values()):
        if isinstance(table, _LazyAutoMapping) and stock in table._model_mapping:
            table._model_mapping[model_type] = rename(table._model_mapping[stock])
            table._reverse_config_mapping[table._config_mapping[model_type]] = model_type
            table._modules[model_type] = module


@known("accelerate", "where it keeps a module's hook (_hf_hook)")
def has_accelerate_hook(module: Any) -> bool:
    """Whether accelerate's device maps or offloading work on this module."""
    return "_hf_hook" in vars(module)
