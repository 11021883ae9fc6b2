"""A cache layer whose rows begin with keys that they have in common, kept once: a prompt with many answers, a prefix.

The common part ``[R, HKV, S, D]`` is what an ordinary growing layer held when its rows were repeated; nothing is
copied, and nobody writes to it any more. What each row adds grows in place behind it, in a layer of its own. Of both,
``update`` returns a tensor that is put together only if something looks at it: our attention takes the parts as they
are.

Whatever cannot be done on the parts makes them whole first: the layer is then a growing layer like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.attn.shared import Parted, Rows, SharedPart, shared_keys
from hf_attn_patch.compat.later import LaterTensor

from .buffers import KVBuffers, buffer_from, capacity_for, in_place_allowed
from .layers import GrowingLayer

#: room for what is expected of a row's own is rounded up to so many keys: there are as many such rests as rows
OWN_BOUNDED_TO = 64


class OwnLayer(GrowingLayer):
    """What rows add to their shared parts. It may be empty and have its buffers."""

    bounded_to = OWN_BOUNDED_TO

    def make_room(self, like: SharedPart, rows: int) -> None:
        """Buffers for one token a row, before there is any; a recorded step writes to them."""
        capacity = capacity_for(1, self.growth, self.expected_length, bounded_to=self.bounded_to)
        empty = like.keys.new_empty(0), like.values.new_empty(0)
        shapes = [t[:1].expand(rows, -1, -1, -1) for t in (like.keys, like.values)]
        buffers = tuple(buffer_from(old, shape, capacity) for old, shape in zip(empty, shapes, strict=True))
        self.lazy_initialization(like.keys, like.values)
        self._keep(KVBuffers(buffers, 0, 0), 0, 0)  # type: ignore[arg-type]


class SharedLayer(GrowingLayer):
    """A full-attention layer of B rows: shared parts, and behind them what is each row's own.

    ``keys`` and ``values`` are those of all rows, ``[B, HKV, Sk, D]``: asking for them makes the layer whole for good,
    because whoever asks may write to them.
    """

    def __init__(self, shared: tuple[SharedPart, ...], growth: float, expected_length: int | None) -> None:
        self.shared = shared
        self.own: Any = OwnLayer()  # no super().__init__(): it sets keys and values
        self.growth = self.own.growth = growth
        self.expected_length = expected_length
        self.dtype, self.device = shared[0].keys.dtype, shared[0].keys.device
        self._expect()

    @classmethod
    def over(cls, layer: GrowingLayer, rows: Rows) -> SharedLayer:
        """A layer of ``len(rows)`` rows that begin with the rows of ``layer``, whose memory it takes over as it is."""
        before: tuple[SharedPart, ...] = ()
        expected = layer.expected_length
        if isinstance(layer, SharedLayer):
            before = tuple(p._replace(rows=p.rows.select(rows.of)) for p in layer.shared)
            layer = layer.own
        # views of our own: a layer that goes on must see that somebody holds its memory
        part = SharedPart(layer.keys.detach(), layer.values.detach(), rows)
        return cls((*before, part), layer.growth, expected)

    def fork(self) -> SharedLayer:
        """Another layer that begins with the same parts, and with a copy of the rows' own."""
        made = SharedLayer.__new__(SharedLayer)
        made.__dict__.update(self.__dict__)
        made.own = copy.copy(self.own)
        return made

    # -- what it holds ---------------------------------------------------------------------------------------------

    @property
    def shared_length(self) -> int:
        return shared_keys(self.shared)

    def _expect(self) -> None:
        """What is expected of the rows' own part, of all that is expected."""
        expected = self.expected_length
        rest = None if expected is None else expected - self.shared_length
        self.own.expected_length = rest if rest is not None and rest > 0 else None

    def rows(self) -> int:
        """B."""
        return len(self.shared[0].rows)

    def make_whole(self) -> None:
        """Give each row all of its keys, as an ordinary growing layer has them."""
        if not self.shared:
            return
        expected, shared = self.expected_length, self.shared
        if self.own.is_initialized and self.own.keys.dim() == 4:
            parted = Parted(shared, self.own.keys, self.own.values)
            keys, values = parted.make(0), parted.make(1)
        else:
            pieces = [[t.index_select(0, p.rows.index(t.device)) for t in p[:2]] for p in shared]
            keys, values = (torch.cat(tensors, dim=2) for tensors in zip(*pieces, strict=True))
        whole = GrowingLayer()
        whole.growth, whole.expected_length = self.growth, expected
        whole.lazy_initialization(keys, values)
        whole.keys, whole.values = keys, values
        self.shared, self.own = (), whole

    @property  # type: ignore[override]
    def keys(self) -> Any:
        self.make_whole()
        return self.own.keys

    @keys.setter
    def keys(self, value: Any) -> None:
        self.make_whole()
        self.own.keys = value

    @property  # type: ignore[override]
    def values(self) -> Any:
        self.make_whole()
        return self.own.values

    @values.setter
    def values(self, value: Any) -> None:
        self.make_whole()
        self.own.values = value

    @property  # type: ignore[override]
    def is_initialized(self) -> bool:
        return bool(self.shared) or self.own.is_initialized

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        if not self.shared:
            self.own.is_initialized = value

    def get_seq_length(self) -> int:
        return self.shared_length + int(self.own.get_seq_length())

    def _held(self) -> KVBuffers | None:
        return self.own._held()  # type: ignore[no-any-return]

    # -- what is done with it --------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, HKV, S, D]`` states to the rows' own; return all that is cached, ``[B, HKV, Sk, D]``."""
        if not self.shared:
            out: tuple[Tensor, Tensor] = self.own.update(key_states, value_states, *args, **kwargs)
            return out
        if not in_place_allowed() or not self._continues(key_states, value_states):
            self.make_whole()
            return self.own.update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        keys, values = self.own.update(key_states, value_states, *args, **kwargs)
        shared = tuple(part for part in self.shared if part.keys.shape[2])
        return later(Parted(shared, keys, values)) if shared else (keys, values)

    def _continues(self, key_states: Tensor, value_states: Tensor) -> bool:
        for old, new in zip(self.shared[-1][:2], (key_states, value_states), strict=True):
            if new.dim() != 4 or old.dtype != new.dtype or old.device != new.device:
                return False
            if new.shape[0] != self.rows() or old.shape[1] != new.shape[1] or old.shape[3] != new.shape[3]:
                return False
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """As in ``DynamicLayer``. Shared keys are left where they are, and seen by nobody."""
        if not self.shared or tokens_to_remove > 0:
            self.make_whole()  # a positive number is a length in some versions, and an error in others
            self.own.crop(tokens_to_remove)
            return
        own = min(-tokens_to_remove, int(self.own.get_seq_length()))
        if own:
            self.own.crop(-own)
        left, parts = -tokens_to_remove - own, list(self.shared)
        while left and len(parts) > 1 and left >= parts[-1].keys.shape[2]:
            left -= parts.pop().keys.shape[2]
        if left:  # the first part may end up with no keys
            last = parts.pop()
            end = max(0, last.keys.shape[2] - left)
            parts.append(last._replace(keys=last.keys[:, :, :end], values=last.values[:, :, :end]))
        if own < -tokens_to_remove:
            self.shared = tuple(parts)
            self._expect()

    def take(self, rows: Sequence[int], index: Tensor) -> None:
        """Make ``rows`` (on the host) of the batch the batch; ``index`` is the same on the device."""
        if not self.shared:
            self.own.reorder_cache(index)
            return
        shared = [_of_rows(part, rows) for part in self.shared]
        if any(new is not old for new, old in zip(shared, self.shared, strict=True)):
            self.shared = tuple(shared)
        if self.own.get_seq_length():
            self.own.reorder_cache(index)
        else:
            self._empty()

    def _empty(self) -> None:
        """No own keys: buffers of another number of rows are of no use."""
        growth, expected = self.own.growth, self.own.expected_length
        room = self.own._held()
        if room is None or room.buffers[0].shape[0] != self.rows():
            self.own = OwnLayer()
            self.own.growth, self.own.expected_length = growth, expected

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.take(beam_idx.tolist(), beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        index = (
            torch.arange(self.rows(), device=indices.device)[indices] if self.shared else indices
        )  # bools, negatives
        self.take(index.tolist() if self.shared else (), index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = [row for row in range(self.rows()) for _ in range(repeats)] if self.shared else []
        if self.shared:
            self.take(rows, torch.tensor(rows, device=self.device))
        else:
            self.own.batch_repeat_interleave(repeats)

    def offload(self) -> None:
        self.make_whole()
        self.own.offload()

    def prefetch(self) -> None:
        self.own.prefetch()

    def reset(self) -> None:
        self.shared = ()
        self.own = GrowingLayer()
        self.own.growth, self.own.expected_length = self.growth, self.expected_length

    def trim(self) -> None:
        self.own.trim()

    def reserve(self) -> KVBuffers | None:
        if self.shared and in_place_allowed() and not self.own.get_seq_length() and self.own._held() is None:
            self.own.make_room(self.shared[-1], self.rows())
        room = self.own._held()
        if room is not None and not room.end and room.has_room(1):
            return room  # type: ignore[no-any-return]
        return self.own.reserve()  # type: ignore[no-any-return]

    def appended(self, tokens: int = 1) -> None:
        self.own.appended(tokens)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have parts of their size."""
        state = self.__dict__.copy()
        state["shared"] = tuple(
            part._replace(keys=_compact(part.keys), values=_compact(part.values)) for part in self.shared
        )
        state["own"] = copy.copy(self.own)
        return state


def _of_rows(part: SharedPart, rows: Sequence[int]) -> SharedPart:
    """The part for other rows of the batch; itself where they begin with the same. Rows of the part that nobody begins
    with any more are let go."""
    of = part.rows.select(rows)
    if of is part.rows:
        return part
    kept = sorted(set(of.of))
    if len(kept) == of.count:
        return part._replace(rows=of)
    where = torch.tensor(kept, device=part.keys.device)
    of = Rows([kept.index(r) for r in of.of], len(kept))
    return SharedPart(part.keys.index_select(0, where), part.values.index_select(0, where), of)


def _compact(states: Tensor) -> Tensor:
    return states.clone(memory_format=torch.contiguous_format)


def later(parted: Parted) -> tuple[Tensor, Tensor]:
    """The keys and values of all rows, put together when something looks at them."""
    keys, values = parted.keys, parted.values
    shapes = [(*t.shape[:2], parted.shared_keys + t.shape[2], t.shape[3]) for t in (keys, values)]
    return (
        LaterTensor(parted, 0, shapes[0], parted.dtype, keys.device),
        LaterTensor(parted, 1, shapes[1], parted.dtype, values.device),
    )
