"""Cache layers that append K and V in place: what :class:`hf_attn_patch.GrowingCache` is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from .buffers import ROUND_TO, KVBuffers, buffer_from, capacity_for, in_place_allowed


class GrowingMixin:
    """What a ``DynamicLayer`` needs in order to append in place; mixed in before it."""

    growth: float = 1.25
    expected_length: int | None = None
    bounded_to: int | None = None
    beforehand: Any = None  # a Beforehand, which layers of one kind have in common
    _room: KVBuffers | None = None

    keys: Any
    values: Any
    is_initialized: bool

    def _held(self) -> KVBuffers | None:
        """The room, if ``keys`` and ``values`` are still the views made of it (nobody replaced or moved them)."""
        room = self._room
        if room is not None and self.keys is room.views[0] and self.values is room.views[1]:
            return room
        return None

    def _keep(self, room: KVBuffers, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Make ``[start, end)`` of the room the layer's states."""
        self._room = room
        self.keys, self.values = views = room.keep(start, end)
        return views

    def _fits(self, key_states: Tensor, value_states: Tensor) -> bool:
        """True if the new states continue the cached ones: same B, HKV, D, dtype, device. What does not is left to
        ``torch.cat``, which promotes the dtype or says what is wrong."""
        if key_states.dim() != 4 or value_states.dim() != 4 or key_states.shape[2] != value_states.shape[2]:
            return False
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            if old.dtype != new.dtype or old.device != new.device:
                return False
            if old.dim() != 4:  # a fresh layer's `torch.tensor([])`
                if old.numel():
                    return False
            elif old.shape[:2] != new.shape[:2] or old.shape[3] != new.shape[3]:
                return False
        return True

    def _append(self, key_states: Tensor, value_states: Tensor, limit: int | None = None) -> KVBuffers | None:
        """Write ``[B, HKV, S, D]`` states behind the stored ones; the room that now holds both.

        None, with nothing changed, where only concatenation is right: see :func:`in_place_allowed` and :meth:`_fits`,
        or if more than ``limit`` keys would have to fit.
        """
        if not in_place_allowed():
            return None
        room, new = self._held(), key_states.shape[2]
        if room is None or not room.takes(key_states, value_states):
            if not self._fits(key_states, value_states):
                return None
            stored = self.keys.shape[2] if self.keys.dim() == 4 else 0
            if stored and self.beforehand is not None:
                self.beforehand.drop()
            if limit is not None and stored + new > limit:
                return None
            if room is None or not room.has_room(new):
                room = self._new_room(key_states, value_states, stored, limit)
        room.write(key_states, value_states)
        return room

    def _new_room(self, like_keys: Tensor, like_values: Tensor, stored: int, limit: int | None) -> KVBuffers:
        """Larger buffers that start with the stored states and have room for one more ``like`` them."""
        needed = stored + like_keys.shape[2]
        capacity = capacity_for(needed, self.growth, self.expected_length, limit, self.bounded_to)
        buffers = None
        if not stored and self.beforehand is not None:
            buffers = self.beforehand.take(like_keys, like_values, capacity)
        if buffers is None:
            buffers = buffer_from(self.keys, like_keys, capacity), buffer_from(self.values, like_values, capacity)
        return KVBuffers(buffers, 0, stored)

    def _limit(self) -> int | None:
        """The most keys that are ever kept in the buffers."""
        return None

    def reserve(self) -> KVBuffers | None:
        """The room behind the stored states, with space for one token that someone else writes; None if there is none
        to be had in place."""
        if not in_place_allowed() or not self.is_initialized or self.keys.dim() != 4 or not self.keys.numel():
            return None
        if self.beforehand is not None:
            self.beforehand.drop()
        room = self._held()
        if room is None or not room.has_room(1):
            if room is not None and room.has_room(0) and room.move_to_front(self.keys.shape[2]):
                self._keep(room, room.start, room.end)
                return room
            stored, limit = self.keys.shape[2], self._limit()
            if limit is not None and stored + 1 > limit:
                return None
            room = self._new_room(self.keys[:, :, :1], self.values[:, :, :1], stored, limit)
            self._keep(room, 0, stored)
        return room

    def appended(self, tokens: int = 1) -> None:
        """So many tokens were written into the room of :meth:`reserve`."""
        room = self._held()
        assert room is not None
        self._keep(room, room.start, room.end + tokens)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, HKV, S, D]`` states; return all that is cached, ``[B, HKV, Sk, D]``, as views of the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)  # type: ignore[attr-defined]
        room = self._append(key_states, value_states)
        if room is not None:
            return self._keep(room, room.start, room.end)
        self._room = None
        out: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        return out

    def crop(self, tokens_to_remove: int) -> None:
        """As in ``DynamicLayer``. The room of the removed tokens is used again, unless someone else holds a view."""
        if tokens_to_remove <= 0 and not self.is_initialized:
            return
        room = self._held()
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if room is not None and self._held() is None:
            room.views = self.keys, self.values  # lets the old ones go: they count if somebody holds them
            offset = self.keys.storage_offset() - room.buffers[0].storage_offset()
            start = offset // room.buffers[0].stride(2)
            # whoever kept a view of the removed states must not see them overwritten
            if room.shared():
                self._room = None
            else:
                self._keep(room, start, start + self.keys.shape[2])

    @contextmanager
    def _whole_buffers(self) -> Iterator[None]:
        """Within, ``keys`` and ``values`` are the buffers, so that an operation on the batch keeps the room."""
        room = self._held()
        if room is None:
            yield
            return
        self.keys, self.values = room.buffers
        try:
            yield
        except BaseException:
            self.keys, self.values = room.views
            raise
        self._keep(KVBuffers((self.keys, self.values), room.start, room.end), room.start, room.end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        room = self._held()
        if room is not None and room.recorded and room.reorder(beam_idx):
            return
        with self._whole_buffers():
            super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        with self._whole_buffers():
            super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        with self._whole_buffers():
            super().batch_select_indices(indices)  # type: ignore[misc]

    def offload(self) -> None:
        self._room = None
        super().offload()  # type: ignore[misc]

    def reset(self) -> None:
        # dropped, not zeroed (transformers before 5.18 zeroes, and goes on counting the zeros as keys)
        self.keys = self.values = self._room = None
        self.is_initialized = False
        super().reset()  # type: ignore[misc]

    def trim(self) -> None:
        """Give the unused room back: ``keys`` and ``values`` become tensors of exactly their size."""
        room = self._held()
        if room is not None:
            self.keys, self.values = (view.clone(memory_format=torch.contiguous_format) for view in room.views)
            self._room = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the states at their size, and share no buffer with the original."""
        state, room = self.__dict__.copy(), self._held()
        state.pop("_room", None)
        state.pop("beforehand", None)
        if room is not None:
            state["keys"], state["values"] = (v.clone(memory_format=torch.contiguous_format) for v in room.views)
        return state


class GrowingSlidingMixin(GrowingMixin):
    """The same for layers that keep the last ``sliding_window - 1`` states: the window walks through the buffer, and
    moves to the front of a new one when it has reached the end."""

    sliding_window: int
    cumulative_length: int
    record_past: bool

    def _limit(self) -> int | None:
        # when the past is recorded nothing is dropped before `crop`, so the room is not bounded by the window
        past = self.sliding_window - 1
        return None if self.record_past else past + max(ROUND_TO, past // 4)

    def appended(self, tokens: int = 1) -> None:
        room = self._held()
        assert room is not None
        self.cumulative_length += tokens
        end = room.end + tokens
        self._keep(room, max(room.start, end + 1 - self.sliding_window), end)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, HKV, S, D]`` states; return those before them in the window, and them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)  # type: ignore[attr-defined]
        past, new = self.sliding_window - 1, key_states.shape[2]
        room = self._append(key_states, value_states, self._limit())
        if room is None:
            self._room = None
            return super(GrowingMixin, self).update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        self.cumulative_length += new
        # as many as `get_mask_sizes` announces: while the past is recorded more may be stored
        visible = room.span(max(room.start, room.end - past - new), room.end)
        self._keep(room, room.start if self.record_past else max(room.start, room.end - past), room.end)
        return visible


class GrowingLayer(GrowingMixin, DynamicLayer):
    """``DynamicLayer`` that appends in place."""


class GrowingSlidingWindowLayer(GrowingSlidingMixin, DynamicSlidingWindowLayer):
    """``DynamicSlidingWindowLayer`` that appends in place."""


class GrowingIndexedLayer(GrowingMixin, DynamicIndexedLayer):
    pass


class GrowingHybridLayer(GrowingMixin, LinearAttentionAndFullAttentionLayer):
    pass


class GrowingHybridSlidingLayer(GrowingSlidingMixin, LinearAttentionAndSlidingWindowAttentionLayer):
    pass


# Layers of any other class (linear attention, a family's own) stay what they are: they do not concatenate K and V.
_GROWING: dict[type, Any] = {
    DynamicLayer: GrowingLayer,
    DynamicSlidingWindowLayer: GrowingSlidingWindowLayer,
    DynamicIndexedLayer: GrowingIndexedLayer,
    LinearAttentionAndFullAttentionLayer: GrowingHybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: GrowingHybridSlidingLayer,
}


def growing(layer: Any, growth: float, expected_length: int | None) -> Any:
    """The growing kind of a layer of transformers, with the same state; the layer itself if it has none."""
    kind = _GROWING.get(type(layer))
    if kind is None:
        return layer
    grown = kind.__new__(kind)
    grown.__dict__.update(layer.__dict__)
    grown.growth, grown.expected_length = growth, expected_length
    return grown
