"""The rows of a whole cache: other rows that begin with them, in all of its layers, sharing what they begin with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.attn.shared import Rows

from .coded_layers import CodedLayer
from .layers import GrowingLayer, GrowingMixin, GrowingSlidingWindowLayer
from .shared_prefix import SharedLayer

#: keys from which on sharing pays: for fewer, one call over copies is faster than one over each part
SHARE_FROM = 512


def rows_of(layers: Sequence[Any]) -> int:
    """B, the rows of the batch that the layers of a cache hold; 0 if they hold nothing yet."""
    for layer in held_in(layers):
        if isinstance(layer, SharedLayer) and layer.shared:
            return layer.rows()
        if isinstance(layer, GrowingMixin) and layer.is_initialized and layer.keys.dim() == 4:
            return int(layer.keys.shape[0])
    return 0


def held_in(layers: Sequence[Any]) -> list[Any]:
    """The layers that hold states: of a layer of codes the two that it consists of; none that keeps nothing."""
    return [held for layer in layers if not _keeps_nothing(layer) for held in _parts(layer)]


def _keeps_nothing(layer: Any) -> bool:
    """Whether it is there to be counted alone: it reads another's keys, or has none (transformers from 5.23 on)."""
    return type(layer).__name__ == "DummyLayer"


def _parts(layer: Any) -> tuple[Any, ...]:
    return (layer.codes, layer.scales) if isinstance(layer, CodedLayer) else (layer,)


def can_begin(layers: Sequence[Any]) -> bool:
    """Whether :func:`begin_with` knows all of the layers."""
    return all(type(layer) in (GrowingLayer, SharedLayer, GrowingSlidingWindowLayer) for layer in held_in(layers))


def begin_with(layers: Sequence[Any], of: Sequence[int], share: bool = True, keep: bool = False) -> list[Any]:
    """Layers of ``len(of)`` rows, of which row i begins with what row ``of[i]`` of ``layers`` holds.

    Args:
        share: keep what all begin with once, where it is long enough for that to pay.
        keep: ``layers`` go on being used as they are, and neither see what the others add.

    Raises:
        TypeError: a layer holds more than keys and values.
    """
    if not can_begin(layers):
        names = sorted({type(layer).__name__ for layer in held_in(layers)})
        raise TypeError(f"rows can share what layers of keys and values hold, and these are {', '.join(names)}")
    rows = Rows(of, rows_of(layers) or 1)
    return [_beginning(layer, rows, share, keep) for layer in layers]


def _beginning(layer: Any, rows: Rows, share: bool, keep: bool) -> Any:
    if isinstance(layer, CodedLayer):
        made = type(layer)(layer.kind, layer.codes, layer.scales)
        made.__dict__.update(layer.__dict__)  # not a copy, which would copy what it holds
        made.codes, made.scales = (_beginning(part, rows, share, keep) for part in (layer.codes, layer.scales))
        return made
    if _keeps_nothing(layer):
        return layer
    parts = isinstance(layer, SharedLayer) and bool(layer.shared)
    held = layer.own if isinstance(layer, SharedLayer) else layer
    length = int(held.get_seq_length()) if held.is_initialized else 0
    can = share and length >= SHARE_FROM and (parts or type(held) is GrowingLayer) and not torch.compiler.is_compiling()
    if can and not (held.keys.requires_grad or held.values.requires_grad):
        return SharedLayer.over(layer, rows)
    if keep:
        layer = layer.fork() if isinstance(layer, SharedLayer) else copy.copy(layer)
    if rows.of == tuple(range(rows.count)):
        return layer
    if parts:
        layer.take(rows.of, rows.index(layer.device))
    elif length:
        layer.reorder_cache(rows.index(held.keys.device))
    return layer


def take_rows(layers: Sequence[Any], index: Tensor) -> bool:
    """Make rows ``index`` of the batch the batch, in all layers; False, with nothing done, if none shares anything."""
    held = held_in(layers)
    if not any(isinstance(layer, SharedLayer) and layer.shared for layer in held):
        return False
    index = torch.arange(rows_of(layers), device=index.device)[index]  # bools and negative ones as numbers
    rows = index.tolist()
    for layer in held:
        if isinstance(layer, SharedLayer):
            layer.take(rows, index)
        else:
            layer.reorder_cache(index)  # of any number of rows; in place where a recorded step wants that
    return True
