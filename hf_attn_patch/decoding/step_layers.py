"""Cache layers for one decoding step of fixed shape: what a :class:`GrowingCache` holds while a step is recorded.

A recorded step (a CUDA graph) runs again on the same memory, so nothing in it may depend on a number of the host. Here
the whole buffers ``[B, HKV, capacity, D]`` are what attention gets, the place of the new token is read on the device,
and the mask says which keys are valid. The buffers are those of the growing layers, which count on afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_attn_patch.attn.codes import pack_both
from hf_attn_patch.attn.shared import CodedAs, Parted, SharedPart, shared_keys
from hf_attn_patch.cache.coded_layers import CodedLayer, joined
from hf_attn_patch.cache.layers import GrowingLayer, GrowingMixin, GrowingSlidingWindowLayer
from hf_attn_patch.cache.shared_prefix import SharedLayer, later

#: shared by a layer's rows, in most layers: one object, so that rooms are compared by identity
NOTHING: tuple[SharedPart, ...] = ()


class TokenPlace:
    """Where the next token goes, on the device: int64 [3], its position, its index in the sliding layers' buffers, and
    that in the buffers of rows that share what is before.

    Each step moves both on by itself (:meth:`advance`), so that nothing is sent in a run of steps; ``host`` says what
    the device holds.
    """

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros(3, dtype=torch.int64, device=device)
        self.position = self.tensor[0]
        self.indices = self.tensor[0:1], self.tensor[1:2], self.tensor[2:3]
        self.tensors = self.tensor, self.position, *self.indices
        self.host: tuple[int, int, int] | None = (0, 0, 0)

    def set(self, *where: int) -> None:
        """Three kernels at most, none if the device is there already; nothing waits."""
        if self.host == where:
            return
        self.host = None
        for index, value in zip(self.indices, where, strict=True):
            index.fill_(value)
        self.host = where  # type: ignore[assignment]

    def advance(self) -> None:
        """Inside the step, on the device alone; on the host :meth:`leave` comes before and :meth:`arrive` behind."""
        self.tensor.add_(1)

    def leave(self) -> tuple[int, int, int]:
        """Where the device is, which is not known until :meth:`arrive`: an interrupt may come between."""
        assert self.host is not None
        host, self.host = self.host, None
        return host

    def arrive(self, host: tuple[int, int, int]) -> None:
        """The device is one further than :meth:`leave` said."""
        self.host = host[0] + 1, host[1] + 1, host[2] + 1


class StepLayer(CacheLayerMixin):
    """A full-attention layer: position and index in the buffers are the same."""

    is_sliding = False
    is_compileable = True
    which = 0  # of the indices in a TokenPlace

    def __init__(self, buffers: tuple[Tensor, Tensor], place: TokenPlace) -> None:
        super().__init__()
        self.keys, self.values = buffers
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True
        self.place, self.index = place, place.indices[self.which]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[B, HKV, 1, D]`` states; return the whole buffers ``[B, HKV, capacity, D]``."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.index, key_states)
        self.values.index_copy_(2, self.index, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """All of the buffer, and the position of its first key."""
        assert self.keys is not None
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        """A tensor: what asks for a number of the host cannot be recorded, and says so by waiting for the device."""
        return self.place.position

    def get_max_length(self) -> int:
        """No limit that a model should know."""
        return -1


class StepSlidingLayer(StepLayer):
    """A sliding layer: the window walks through the buffer."""

    is_sliding = True
    which = 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """All of the buffer, and the position of its first key (which may be one that is no longer kept)."""
        assert self.keys is not None
        return self.keys.shape[2], self.place.position - self.place.tensor[1]


class StepSharedLayer(StepLayer):
    """A full-attention layer whose rows share what is before their own buffers ``[B, HKV, capacity, D]``."""

    which = 2

    def __init__(self, buffers: tuple[Tensor, Tensor], place: TokenPlace, shared: tuple[SharedPart, ...]) -> None:
        super().__init__(buffers, place)
        self.shared = shared

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[B, HKV, 1, D]`` states; return the shared keys and values and the whole buffers behind them."""
        return later(Parted(self.shared, *super().update(key_states, value_states)))

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """The shared keys and all of the buffer."""
        return shared_keys(self.shared) + super().get_mask_sizes(query_length)[0], 0


class StepCodedLayer(StepLayer):
    """A layer of codes: their buffers, and those of their scales, are layers that are written to at the same place."""

    def __init__(self, codes: StepLayer, scales: StepLayer, coded: CodedAs) -> None:
        self.which, self.is_sliding = codes.which, codes.is_sliding
        assert codes.keys is not None
        assert codes.values is not None
        super().__init__((codes.keys, codes.values), codes.place)
        self.codes, self.scales, self.coded = codes, scales, coded

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[B, HKV, 1, D]`` states as codes; return all codes of the buffers, and shared ones before them."""
        (keys, key_scales), (values, value_scales) = pack_both(key_states, value_states, self.coded.kind)
        both = self.codes.update(keys, values), self.scales.update(key_scales, value_scales)
        return later(joined(*both, self.coded))

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """As of the layer of codes."""
        return self.codes.get_mask_sizes(query_length)


@dataclass
class StepRoom:
    """The buffers that a step writes to, and where."""

    rooms: list[Any]  # one a layer; None: a layer that stores nothing
    buffers: list[tuple[Tensor, ...] | None]  # keys and values; behind codes also the scales of both
    sliding: list[bool]
    shared: list[tuple[SharedPart, ...]]  # what a layer's rows share before their buffers; none in most
    position: int
    slot: int
    own: int
    expected: int  # keys that the cache is expected to hold in the end; -1 if nobody said

    @property
    def where(self) -> tuple[int, int, int]:
        """What a :class:`TokenPlace` holds."""
        return self.position, self.slot, self.own

    def tensors(self) -> list[Tensor]:
        """The buffers, and what is shared before them."""
        found = [t for buffers in self.buffers if buffers is not None for t in buffers]
        for part in (part for shared in self.shared for part in shared):
            found += [part.keys, part.values, *(part.scales or ()), *part.rows.tensors(part.keys.device)]
        return found

    def form(self) -> Any:
        """What rooms are told apart by, beside the form of their tensors."""
        shared = tuple(tuple((part.rows.of, part.scales is None) for part in parts) for parts in self.shared)
        return tuple(None if b is None else len(b) for b in self.buffers), tuple(self.sliding), shared

    def ends(self) -> list[int]:
        """The keys that layers can hold which see all of them."""
        layers = zip(self.buffers, self.sliding, self.shared, strict=True)
        return [b[0].shape[2] + shared_keys(shared) for b, sliding, shared in layers if b and not sliding]

    def same_buffers(self, other: StepRoom) -> bool:
        """Whether a step recorded for ``other`` writes to the right memory here."""
        mine, theirs = self.buffers, other.buffers
        if len(mine) != len(theirs):
            return False
        for a, b in zip(mine, theirs):  # noqa: B905 - compared just above, and this runs per token
            if a is not b and (a is None or b is None or not all(map(operator.is_, a, b))):
                return False
        return all(map(operator.is_, self.shared, other.shared))


def reserve(cache: Any) -> StepRoom | None:
    """Make room for one token in every layer of a growing cache.

    Returns:
        None if some layer is not one whose step can be recorded, or layers of a kind disagree about where they are.
    """
    rooms: list[Any] = []
    sliding: list[bool] = []
    shared: list[tuple[SharedPart, ...]] = []
    position = slot = own = expected = -1
    for layer in cache.layers:
        held = layer.codes if isinstance(layer, CodedLayer) else layer
        kind = type(held)
        shared.append(held.shared if kind is SharedLayer else NOTHING)
        if kind is GrowingLayer or kind is SharedLayer:
            room = layer.reserve()
            if room is None or room.start or position not in (-1, room.end + shared_keys(shared[-1])):
                return None
            position = room.end + shared_keys(shared[-1])
            if shared[-1]:
                if own not in (-1, room.end):
                    return None
                own = room.end
        elif kind is GrowingSlidingWindowLayer and not layer.record_past:
            room = layer.reserve()
            if room is None or slot not in (-1, room.end) or position not in (-1, layer.cumulative_length):
                return None
            position, slot = layer.cumulative_length, room.end
        elif kind.__name__ == "DummyLayer":  # what shares another layer's K and V (transformers 5.23 on)
            rooms.append(None)
            sliding.append(False)
            continue
        else:
            return None
        rooms.append(room)
        expected = layer.expected_length or -1
        sliding.append(kind is GrowingSlidingWindowLayer)
    if position < 0:
        return None
    buffers = [room and room.buffers for room in rooms]
    return StepRoom(rooms, buffers, sliding, shared, position, max(slot, 0), max(own, 0), expected)


def advance(cache: Any, tokens: int = 1) -> None:
    """Tell the growing layers that steps have written so many tokens behind their last one."""
    for layer in cache.layers:
        if isinstance(layer, GrowingMixin):
            layer.appended(tokens)


def step_layers(cache: Any, room: StepRoom, place: TokenPlace) -> list[Any]:
    """The layers that ``cache`` has while the step runs."""
    layers: list[Any] = []
    for layer, buffers, sliding, shared in zip(cache.layers, room.buffers, room.sliding, room.shared, strict=True):
        if buffers is not None and isinstance(layer, CodedLayer):
            codes = _step_layer(buffers[:2], place, sliding, shared)
            scales = _step_layer(buffers[2:], place, sliding, layer.scales.shared if shared else NOTHING)
            layer = StepCodedLayer(codes, scales, layer.coded)
        elif buffers is not None:
            layer = _step_layer(buffers, place, sliding, shared)
        layers.append(layer)
    return layers


def _step_layer(buffers: Any, place: TokenPlace, sliding: bool, shared: tuple[SharedPart, ...]) -> StepLayer:
    if shared:
        return StepSharedLayer(buffers, place, shared)
    return (StepSlidingLayer if sliding else StepLayer)(buffers, place)


@contextmanager
def standing_in(cache: Any, layers: list[Any]) -> Iterator[None]:
    """Within, ``cache`` has these layers."""
    own, cache.layers = cache.layers, layers
    try:
        yield
    finally:
        cache.layers = own


def settle(room: StepRoom) -> None:
    """Prepare the buffers for steps that are recorded: zeros where nothing was written yet (kernels that multiply by a
    mask must not meet NaN there), and no leaving them without need."""
    for one in room.rooms:
        if one is not None:
            one.recorded = True
            for buffer in one.buffers:
                buffer[:, :, one.end :].zero_()
