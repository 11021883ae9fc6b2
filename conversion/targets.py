"""How many KV heads each layer shall have: one number, one a layer, ranges of layers, or numbers by attention."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_attn_patch.errors import ConversionError, GroupingError
from hf_attn_patch.grouping import KVGrouping, divisors

from .families.config import LanguageModel
from .families.layer import LayerAttention, config_of, of_one_number
from .families.table import Stack
from .plan_data import KVHeads


def of_caches(model: LanguageModel, kv_heads: KVHeads) -> KVHeads:
    """One number for all attentions, by the names of those that it is for: all that have a cache."""
    stacks = of_one_number(stack for stack, _ in model.stacks)
    if isinstance(kv_heads, Mapping) or len(stacks) == len(model.stacks):
        return kv_heads
    return {stack.name: kv_heads for stack in stacks}


def with_targets(model: LanguageModel, kv_heads: KVHeads) -> list[LayerAttention]:
    """Every layer of every stack, with the number of KV heads that it shall have."""
    names = [stack.name for stack, _ in model.stacks]
    wanted = kv_heads if isinstance(kv_heads, Mapping) else dict.fromkeys(names, kv_heads)
    if any(name[:1].isdigit() for name in wanted):
        wanted = {names[0]: _of_ranges(wanted, model)}
    for name in wanted:
        if name not in names:
            raise ConversionError(f"{model.model_type} has no attention {name!r}; it has {', '.join(names)}")
    out = []
    for stack, layers in model.stacks:
        target = wanted.get(stack.name)
        if target is None:
            numbers = [layer.kv_heads for layer in layers]
        elif isinstance(target, int):
            config = config_of(stack, model.text_config)
            numbers = [stack.kv_field.wanted(config, target, layer.index) for layer in layers]
        else:
            numbers = _per_layer(target, len(layers), stack)
        for layer, number in zip(layers, numbers, strict=True):
            out.append(_with_target(layer, number))
    return out


def _of_ranges(wanted: Mapping[str, Any], model: LanguageModel) -> list[int]:
    """``{"10-20": 4}``, layers counted from 0 and both ends included, as a number for each; the others stay."""
    if len(model.stacks) > 1:
        names = ", ".join(stack.name for stack, _ in model.stacks)
        raise ConversionError(f"ranges of layers are for models with one attention, and {model.model_type} has {names}")
    layers = model.stacks[0][1]
    numbers: dict[int, Any] = {layer.index: layer.kv_heads for layer in layers}  # hybrids: of some layers
    given: set[int] = set()
    for name, number in wanted.items():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", name)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not match or first > last or last > max(numbers):
            raise ConversionError(f"{name!r} is no range of the layers 0 to {max(numbers)}; write 10-20=4")
        named = set(range(first, last + 1))
        if given & named:
            raise ConversionError(f"the range {name} names a layer that another range named already")
        if not named & set(numbers):
            raise ConversionError(f"no layer of {name} has attention; those that have: {', '.join(map(str, numbers))}")
        given |= named
        numbers.update(dict.fromkeys(named & set(numbers), number))
    return list(numbers.values())


def _per_layer(target: Sequence[int], num_layers: int, stack: Stack) -> list[int]:
    numbers = list(target)
    if len(numbers) != num_layers:
        raise ConversionError(
            f"{len(numbers)} numbers of KV heads for {num_layers} layers{' with attention' * stack.sparse} "
            f"({stack.name}); give one per layer"
        )
    return numbers


def _with_target(layer: LayerAttention, number: int) -> LayerAttention:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ConversionError(f"{number!r} KV heads: give a whole number from 1 to {layer.kv_heads}")
    if number > layer.kv_heads:
        raise ConversionError(
            f"{number} KV heads are more than the {layer.kv_heads} of the source; a conversion can only merge heads"
        )
    try:
        layer.grouping.merged(number)
        KVGrouping(layer.heads, number)
    except GroupingError:
        choices = ", ".join(str(n) for n in divisors(layer.kv_heads))
        raise ConversionError(
            f"{layer.kv_heads} KV heads cannot be merged evenly into {number}; choose one of {choices}"
        ) from None
    return replace(layer, new_kv_heads=number)
