"""The buffers of all layers made when the first one gets its prompt, before the large activations of its MLP exist.

torch's caching allocator gives out the smallest free block that is large enough, and splits it. A layer that makes its
buffers when it comes to it takes them out of a block that the MLP of the layer before left free, where the next MLP's
activations then no longer fit: at 16 prompts of 16k tokens a model of Llama-3-8B's widths needs three more blocks of
7 GiB each in the course of a prompt. Buffers that are there before these blocks leave them whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .coded_layers import CodedLayer
from .layers import GrowingLayer, GrowingSlidingWindowLayer

#: where memory is given out that way
DEVICES = {"cuda"}
#: bytes of a buffer from which on it gets a block that others could use
WORTH = 16 << 20


class Beforehand:
    """Buffers for layers of one kind, which are all alike.

    Args:
        layers: how many layers there are.
    """

    __slots__ = ("layers", "made")

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.made: list[tuple[Tensor, Tensor]] = []

    def take(self, like_keys: Tensor, like_values: Tensor, capacity: int) -> tuple[Tensor, Tensor] | None:
        """Buffers ``[B, HKV, capacity, D]`` for a layer that gets its first states; None: it makes its own.

        Layers that turn out to differ are left alone from then on.
        """
        shapes = [(*like.shape[:2], capacity, like.shape[3]) for like in (like_keys, like_values)]
        if not self.made:
            if self.layers < 2 or min(map(_bytes, shapes, (like_keys, like_values))) < WORTH:
                return None
            try:
                for _ in range(self.layers):
                    self.made.append((like_keys.new_empty(shapes[0]), like_values.new_empty(shapes[1])))
            except torch.OutOfMemoryError:  # it may yet do for one after the other
                self.give_up()
                return None
        found = self.made.pop()
        for buffer, shape, like in zip(found, shapes, (like_keys, like_values), strict=True):
            same = buffer.shape == shape and buffer.dtype == like.dtype and buffer.device == like.device
            if not same or buffer.is_inference() != torch.is_inference_mode_enabled():
                self.give_up()
                return None
        return found

    def drop(self) -> None:
        """The prompt is over: what no layer took, none will."""
        self.made.clear()

    def give_up(self) -> None:
        """Each layer makes its own from now on."""
        self.drop()
        self.layers = 0


def _bytes(shape: tuple[int, ...], like: Tensor) -> int:
    return torch.Size(shape).numel() * like.itemsize


def make_together(model: torch.nn.Module, cache: Any) -> Any:
    """Let the layers of a growing cache that holds nothing yet, and that ``model`` will fill, make their buffers
    together; not where the model's weights are on several devices.

    Returns:
        the cache.
    """
    devices = {p.device for p in model.parameters()}
    if cache.offloading or len(devices) != 1 or next(iter(devices)).type not in DEVICES:
        return cache
    running = {
        getattr(module, "layer_idx", None) for module in model.modules()
    }  # there may be fewer than in the config
    kinds: dict[Any, list[Any]] = {}
    for index, layer in enumerate(cache.layers):
        parts = (layer.codes, layer.scales) if isinstance(layer, CodedLayer) else (layer,)
        for place, part in enumerate(parts):
            if index in running and type(part) in (GrowingLayer, GrowingSlidingWindowLayer):
                kinds.setdefault((place, getattr(part, "sliding_window", None)), []).append(part)
    for alike in kinds.values():
        together = Beforehand(len(alike))
        for part in alike:
            part.beforehand = together
    return cache
