"""Layers that a checkpoint has beside its model, to draft further tokens (MTP): transformers' models do not load them.

They have attentions of their own with the numbers of the same config, so they would not fit it once the model's heads
are merged; engines that draft with them would refuse the checkpoint. A conversion that changes heads leaves them out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hf_attn_patch.errors import ConversionError

from .config import LanguageModel, part_of
from .layer import attribute, config_of

#: config fields that count them
FIELDS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_NAMED = re.compile(r"(^|\.)mtp(_\w+)?\.")


def drafting_layers(raw: Mapping[str, Any]) -> int:
    """How many such layers a config counts behind the model's own."""
    found = [raw.get(name) for name in FIELDS]
    return max([0, *(n for n in found if isinstance(n, int) and not isinstance(n, bool))])


def drafting_tensors(names: Iterable[str], layer: str, count: int, behind: int) -> set[str]:
    """The tensors of such layers.

    Args:
        layer: how the model's own layers are called, with ``{i}`` for their number.
        count: how many layers the model has; ``behind``: how many more may follow under the same name.

    >>> sorted(drafting_tensors(["mtp.fc.weight", "layers.1.a", "layers.2.a", "layers.3.a"], "layers.{i}.", 2, 1))
    ['layers.2.a', 'mtp.fc.weight']
    """
    start = layer[: layer.index("{i}")]
    numbers = tuple(f"{start}{i}." for i in range(count, count + behind))
    return {name for name in names if _NAMED.search(name) or (numbers and name.startswith(numbers))}


def drafting_of(raw: dict[str, Any], names: Collection[str], model: LanguageModel, where: str) -> set[str]:
    """The tensors of a checkpoint's drafting layers.

    Raises:
        ConversionError: it has more layers than its config counts, which would keep their old heads.
    """
    behind = drafting_layers(part_of(raw, model.path))
    out: set[str] = set()
    for stack, _ in model.stacks:
        count, layer = attribute(config_of(stack, model.text_config), stack.num_layers), model.prefix + stack.layer
        out |= drafting_tensors(names, layer, count, behind)
        for name in names:
            if name.startswith(layer.format(i=count)) and name not in out:
                raise ConversionError(f"config.json says {count} layers, but {where} has tensor {name!r}")
    return out


def without_drafting(raw: dict[str, Any], config: Any) -> None:
    """Change a config so that it counts none.

    Published configs pad their lists of layers by them (Step 3.5), which is an error where none is counted.

    Args:
        raw: the JSON, changed; ``config``: as transformers reads it, with the lists of its own layers alone.
    """
    count = drafting_layers(raw)
    for name in FIELDS:
        if raw.get(name):
            raw[name] = 0
    for name, own in config.to_dict().items():
        if isinstance(own, list) and isinstance(raw.get(name), list) and len(raw[name]) == len(own) + count:
            raw[name] = raw[name][: len(own)]
