"""Cache layers that keep keys and values as codes of 8 bits (``attn/codes.py``): half the memory, and not exact.

A layer holds two growing layers that go the same ways: one of codes [B, HKV, S, D], one of scales [B, HKV, S, 1]. So
whatever growing layers can do (grow in place, walk with a window, share rows, be recorded) codes can. The first call, a
prompt's, attends to the exact keys and values that it has in hand. Later ones get tensors that are codes: our decode
kernel reads them as they are, and everything else makes numbers of them by looking at them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_attn_patch.attn.codes import Kind, pack_both, unpack
from hf_attn_patch.attn.shared import CodedAs, Parted, SharedPart
from hf_attn_patch.compat.later import LaterTensor

from .buffers import KVBuffers
from .layers import GrowingLayer, GrowingMixin, GrowingSlidingWindowLayer, growing
from .shared_prefix import later

Pair = tuple[Tensor, Tensor]


class CodedRoom:
    """The rooms of codes and of scales, as one: what a recorded step writes to."""

    def __init__(self, codes: KVBuffers, scales: KVBuffers) -> None:
        self.codes, self.scales = codes, scales
        self.buffers = (*codes.buffers, *scales.buffers)
        self.start, self.end, self.capacity = codes.start, codes.end, min(codes.capacity, scales.capacity)

    @property
    def recorded(self) -> bool:
        """Whether a recorded step writes to this memory."""
        return self.codes.recorded

    @recorded.setter
    def recorded(self, value: bool) -> None:
        self.codes.recorded = self.scales.recorded = value


def joined(codes: Pair, scales: Pair, coded: CodedAs) -> Parted:
    """What layers of codes and of scales give, as one: of their rows' own, and of what rows share."""
    key = codes[0]
    if type(key) is not LaterTensor:
        return Parted((), *codes, scales, coded)
    ours, theirs = key.form, scales[0].form  # type: ignore[attr-defined]
    shared = tuple(
        SharedPart(part.keys, part.values, part.rows, (scale.keys, scale.values))
        for part, scale in zip(ours.shared, theirs.shared, strict=True)
    )
    return Parted(shared, ours.keys, ours.values, (theirs.keys, theirs.values), coded)


class CodedLayer(GrowingMixin, DynamicLayer):
    """A full-attention layer of codes.

    ``keys`` and ``values`` are the numbers that the codes stand for: made at each look, so that writing into them
    changes nothing; replacing them does.

    Args:
        kind: of the codes.
        codes, scales: the layers that hold them, empty, and of one class.
    """

    def __init__(self, kind: Kind, codes: Any, scales: Any) -> None:  # no super().__init__(): it sets keys and values
        self.kind, self.codes, self.scales = kind, codes, scales
        self.dtype: Any = None

    # -- what it holds ---------------------------------------------------------------------------------------------

    def _numbers(self, which: int) -> Any:
        if not self.is_initialized:
            return None
        codes, scales = ((layer.keys, layer.values)[which] for layer in (self.codes, self.scales))
        if codes.dim() != 4:
            return torch.tensor([], dtype=self.dtype, device=codes.device)
        return unpack(codes, scales, self.kind.of(which), self.dtype)

    def _replace(self, which: int, value: Any) -> None:
        packed = (None, None) if value is None else pack_both(value, value, self.kind)[which]
        for layer, new in zip((self.codes, self.scales), packed, strict=True):
            setattr(layer, ("keys", "values")[which], new)

    @property  # type: ignore[override]
    def keys(self) -> Any:
        return self._numbers(0)

    @keys.setter
    def keys(self, value: Any) -> None:
        self._replace(0, value)

    @property  # type: ignore[override]
    def values(self) -> Any:
        return self._numbers(1)

    @values.setter
    def values(self, value: Any) -> None:
        self._replace(1, value)

    @property  # type: ignore[override]
    def is_initialized(self) -> bool:
        return bool(self.codes.is_initialized)

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        self.codes.is_initialized = self.scales.is_initialized = value

    @property
    def coded(self) -> CodedAs:
        """What its codes are."""
        return CodedAs(self.kind, self.dtype)

    @property
    def expected_length(self) -> int | None:  # type: ignore[override]
        length: int | None = self.codes.expected_length
        return length

    @expected_length.setter
    def expected_length(self, value: int | None) -> None:
        self.codes.expected_length = self.scales.expected_length = value

    @property
    def shared_length(self) -> int:
        """How many keys of each row are shared."""
        return int(getattr(self.codes, "shared_length", 0))

    def _held(self) -> KVBuffers | None:
        return self.codes._held()  # type: ignore[no-any-return]

    def get_seq_length(self) -> int:
        return int(self.codes.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.codes.get_mask_sizes(query_length)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind.name})"

    # -- what is done with it --------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        for layer, dtype in ((self.codes, torch.int8), (self.scales, torch.float32)):
            empty = key_states.new_empty(0, dtype=dtype)
            layer.lazy_initialization(empty, empty)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, HKV, S, D]`` states; return all that is cached: the states themselves where nothing was before,
        else codes that look like ``[B, HKV, Sk, D]``.

        Raises:
            RuntimeError: gradients are wanted.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError(
                f"a cache of {self.kind.name} codes passes no gradients on: run the model under torch.no_grad(), or "
                "make the cache without dtype="
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, self.dtype = not self.get_seq_length(), key_states.dtype
        (codes, scales), (value_codes, value_scales) = pack_both(key_states, value_states, self.kind)
        both = self.codes.update(codes, value_codes), self.scales.update(scales, value_scales)
        if first:
            return key_states, value_states
        found = joined(*both, self.coded)
        if torch.compiler.is_compiling():  # which cannot trace what is not yet a tensor
            return found.make(0), found.make(1)
        return later(found)

    def crop(self, tokens_to_remove: int) -> None:
        self.codes.crop(tokens_to_remove)
        self.scales.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.codes.reorder_cache(beam_idx)
        self.scales.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.codes.batch_repeat_interleave(repeats)
        self.scales.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.codes.batch_select_indices(indices)
        self.scales.batch_select_indices(indices)

    def offload(self) -> None:
        self.codes.offload()
        self.scales.offload()

    def prefetch(self) -> None:
        self.codes.prefetch()
        self.scales.prefetch()

    def reset(self) -> None:
        self.codes.reset()
        self.scales.reset()

    def trim(self) -> None:
        for layer in (self.codes, self.scales):
            if isinstance(layer, GrowingMixin):
                layer.trim()

    def reserve(self) -> Any:
        rooms = self.codes.reserve(), self.scales.reserve()
        if None in rooms or rooms[0].end != rooms[1].end or rooms[0].start != rooms[1].start:
            return None
        return CodedRoom(*rooms)

    def appended(self, tokens: int = 1) -> None:
        self.codes.appended(tokens)
        self.scales.appended(tokens)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles share nothing with the original."""
        return self.__dict__ | {"codes": copy.copy(self.codes), "scales": copy.copy(self.scales)}


class CodedSlidingWindowLayer(CodedLayer, DynamicSlidingWindowLayer):
    """The same for a layer that keeps the last ``sliding_window - 1`` states."""

    @property
    def sliding_window(self) -> int:
        return int(self.codes.sliding_window)

    @property
    def cumulative_length(self) -> int:
        return int(self.codes.cumulative_length)

    @property
    def record_past(self) -> bool:
        return bool(self.codes.record_past)

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.codes.record_past = self.scales.record_past = value


def coded(layer: Any, kind: Kind, growth: float, expected_length: int | None, offloaded: bool = False) -> Any:
    """A layer of codes that holds what a layer of transformers holds.

    Args:
        offloaded: it crosses the bus at each token, and is kept at its exact size.

    Raises:
        TypeError: the layer holds more than keys and values.
    """
    if type(layer) is DynamicLayer:
        made: Any = CodedLayer(kind, *((DynamicLayer if offloaded else GrowingLayer)() for _ in "cs"))
    elif type(layer) is DynamicSlidingWindowLayer:
        inner: Any = DynamicSlidingWindowLayer if offloaded else GrowingSlidingWindowLayer
        made = CodedSlidingWindowLayer(kind, *(inner(sliding_window=layer.sliding_window) for _ in "cs"))
    elif isinstance(layer, DynamicLayer):
        raise TypeError(
            f"a {type(layer).__name__} holds more than keys and values, and is not kept as {kind.name} codes: make the "
            'cache without dtype= (of generate: enable(model, cache="growing"))'
        )
    else:
        return layer
    for part in (made.codes, made.scales):
        if not offloaded:
            part.growth, part.expected_length = growth, expected_length
    if layer.is_initialized and layer.keys.dim() == 4:
        with torch.no_grad():
            made.update(layer.keys, layer.values)
    if made.is_sliding:
        for part in (made.codes, made.scales):
            part.cumulative_length, part.record_past = layer.cumulative_length, layer.record_past
    return made


def grown(layer: Any, growth: float, expected_length: int | None, kind: Kind | None, offloaded: bool) -> Any:
    """The growing kind of a layer of transformers, or the coded one; what is offloaded does not grow in place."""
    if kind is not None:
        return coded(layer, kind, growth, expected_length, offloaded)
    return layer if offloaded else growing(layer, growth, expected_length)


def grown_new(*how: Any) -> Any:
    """:func:`grown` of a full-attention layer that holds nothing yet."""
    return grown(DynamicLayer(), *how)
