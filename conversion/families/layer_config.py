"""From config.json to transformers' config object, and to what one layer sees of it.

Layers differ by ``per_layer_config`` (5.17 and newer, the oldest that we run on): what differs cannot be read from the
whole model's config, which raises.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def layer_config(config: Any, layer: int) -> Any:
    """The config of one layer: the whole model's where layers do not differ."""
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


def layer_overrides(config: Any) -> dict[int, dict[str, Any]]:
    """What layers have of their own, as transformers would save it: by index, the attributes and their values."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    saved = json.loads(json.dumps(config.to_dict()["per_layer_config"]))
    return {int(layer): own for layer, own in saved.items()}


#: keys (with or without underscores before them) by which a config chooses code
CODE = ("attn_implementation", "experts_implementation")


def config_object(raw: Mapping[str, Any]) -> Any:
    """A config.json as transformers' config object.

    Its files write floats that JSON has not as ``{"__float__": "Infinity"}``, which ``from_dict`` takes as they are. An
    attention that it names is left out: transformers would fetch a kernel of that name, and run it.

    Raises:
        KeyError: this transformers does not know the model type; and whatever its classes refuse a config with.
    """
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[raw["model_type"]].from_dict(_decoded(dict(raw)))


def _decoded(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _decoded(inner) for key, inner in value.items() if not str(key).lstrip("_").startswith(CODE)}
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value
