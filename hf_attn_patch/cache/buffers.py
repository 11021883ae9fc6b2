"""The memory of a cache layer that grows in place: K and V buffers with room at the end, and what is in use of them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn_patch.compat.torch import storage_users

ROUND_TO = 256  # capacities are multiples of this many keys


def capacity_for(
    needed: int, growth: float, expected: int | None, limit: int | None = None, bounded_to: int | None = None
) -> int:
    """Keys to make room for when ``needed`` must fit: more by ``growth``, but not past what is known to be enough.

    Args:
        bounded_to: what is known to be enough counts to a multiple of this, where :data:`ROUND_TO` is too coarse.
    """
    target = max(needed, int(needed * growth))
    if bounded_to is not None:
        target = -(-target // ROUND_TO) * ROUND_TO
    for bound in (expected, limit):
        if bound is not None and needed <= bound:
            target = min(target, bound)
    multiple = bounded_to or ROUND_TO
    return -(-target // multiple) * multiple


def buffer_from(old: Tensor, like: Tensor, capacity: int) -> Tensor:
    """A buffer ``[B, HKV, capacity, D]`` that starts with ``old [B, HKV, S, D]``; the rest is left as it comes."""
    B, H, _, D = like.shape
    buffer = like.new_empty(B, H, capacity, D)
    if old.numel():
        buffer.narrow(2, 0, old.shape[2]).copy_(old)
    return buffer


def in_place_allowed() -> bool:
    """False where an in-place write would disturb a graph: autograd counts a write as a change of every view of the
    buffer, and a compiled graph would bake in the position. There the layers concatenate, as ``DynamicLayer`` does."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


class KVBuffers:
    """K and V buffers ``[B, HKV, capacity, D]``, and the views of ``[start, end)`` that a layer's states are."""

    __slots__ = ("buffers", "capacity", "end", "geometry", "inference", "recorded", "shapes", "start", "views")

    def __init__(self, buffers: tuple[Tensor, Tensor], start: int, end: int) -> None:
        self.buffers = buffers
        self.capacity = buffers[0].shape[2]
        self.inference = buffers[0].is_inference()
        self.geometry = tuple((*b.shape[:2], b.shape[3], b.stride(), b.storage_offset()) for b in buffers)
        self.shapes: tuple[torch.Size, torch.Size] | None = None  # of the states that were appended last
        self.recorded = False  # a recorded step writes to this memory: better to stay in it
        self.keep(start, end)

    def span(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Views of ``[start, end)``; ``as_strided`` takes half of the time of ``narrow``, and this runs per token."""
        (k, v), ((kB, kH, kD, k_stride, k_offset), (vB, vH, vD, v_stride, v_offset)) = self.buffers, self.geometry
        return (
            k.as_strided((kB, kH, end - start, kD), k_stride, k_offset + start * kD),
            v.as_strided((vB, vH, end - start, vD), v_stride, v_offset + start * vD),
        )

    def keep(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        self.start, self.end, self.views = start, end, self.span(start, end)
        return self.views

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Behind ``end``, which moves."""
        end = self.end + key_states.shape[2]
        keys, values = self.span(self.end, end)
        keys.copy_(key_states)
        values.copy_(value_states)
        self.end, self.shapes = end, (key_states.shape, value_states.shape)

    def has_room(self, new: int) -> bool:
        """A buffer made under inference_mode may not be written outside of it."""
        return self.end + new <= self.capacity and (not self.inference or torch.is_inference_mode_enabled())

    def takes(self, key_states: Tensor, value_states: Tensor) -> bool:
        """A quick yes for states like the last ones, which is what decoding appends."""
        k, v = self.buffers
        return (
            self.shapes is not None
            and key_states.shape == self.shapes[0]
            and value_states.shape == self.shapes[1]
            and key_states.dtype == k.dtype
            and value_states.dtype == v.dtype
            and key_states.device == k.device
            and self.has_room(key_states.shape[2])
        )

    def move_to_front(self, stored: int) -> bool:
        """Move the ``stored`` keys in use to the front of the same buffers, if that makes room and disturbs nobody."""
        if self.start == 0 or self.shared():
            return False
        for buffer in self.buffers:
            kept = buffer[:, :, self.start : self.end]
            buffer[:, :, :stored].copy_(kept.clone() if self.start < stored else kept)
        self.start, self.end = 0, stored
        return True

    def reorder(self, rows: Tensor) -> bool:
        """Put the batch's ``rows [B]`` in this order, in the same buffers, if that is allowed and disturbs nobody."""
        if len(rows) != self.geometry[0][0] or not in_place_allowed() or not self.has_room(0) or self.shared():
            return False
        for buffer in self.buffers:
            kept = buffer[:, :, self.start : self.end]
            kept.copy_(kept.index_select(0, rows.to(buffer.device)))
        return True

    def shared(self) -> bool:
        """True if someone holds a view of the buffers besides the layer."""
        return any(storage_users(buffer) > 2 for buffer in self.buffers)
