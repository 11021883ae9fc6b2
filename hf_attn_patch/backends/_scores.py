"""Masks and biases as one float tensor of scores to add, for kernels that take no better description.

T5's bias is the same tensor in all layers, and so is a mask. What a kernel wants of them (one dtype, aligned rows,
which queries see nothing and which keys nobody sees) is worked out at the first layer and kept with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.layout import FULL, Layout

from ._common import cut_bias

_ATTRIBUTE = "_hf_attn_scores"


class Scores:
    """What is added to the scores of one layout, float [B or 1, HQ or 1, Sq, Sk].

    ``blind`` (bool [B or 1, HQ or 1, Sq, 1]) marks the queries that see no key, ``dead`` (bool [B or 1, Sk]) the keys
    that no query sees. On a GPU both stay tensors until the device has said, unasked, that there are none: nothing
    waits for it.
    """

    __slots__ = ("_asked", "_said", "blind", "dead", "values")

    def __init__(self, layout: Layout, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        mask = layout.dense(device)
        if bias is None:
            assert mask is not None
            zero = torch.zeros((), dtype=dtype, device=device)
            values = zero.expand(mask.shape).masked_fill(~mask, -torch.inf)
        else:
            values = cut_bias(layout, bias).to(dtype)
            if mask is not None:
                values = values.masked_fill(~mask, -torch.inf)
        values = values.expand(*values.shape[:2], layout.q_len, layout.keys)
        self.values = _aligned(values)
        self.blind: Tensor | None = values.amax(-1, keepdim=True) == -torch.inf
        self.dead: Tensor | None = values.amax((1, 2)) == -torch.inf
        self._asked: Any = None
        self._said = torch.stack([self.blind.any(), self.dead.any()])
        if device.type == "cpu":
            self._listen()
        elif not torch.cuda.is_current_stream_capturing():
            self._said = self._said.to("cpu", non_blocking=True)
            self._asked = torch.cuda.Event()
            self._asked.record()

    def _listen(self) -> None:
        blind, dead = self._said.tolist()
        self.blind, self.dead = self.blind if blind else None, self.dead if dead else None
        self._asked = None

    def settle(self) -> None:
        """Drop what the device has found to be empty, if it has said so by now."""
        if self._asked is not None and self._asked.query():
            self._listen()

    def clean(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V with zeros where nobody looks, so that NaN cannot leak from there."""
        if self.dead is None:
            return k, v
        dead = self.dead[:, None, :, None]
        return k.masked_fill(dead, 0), v.masked_fill(dead, 0)


def _aligned(values: Tensor) -> Tensor:
    """Rows of 16 bytes' alignment, of their own memory, one element after the other."""
    *outer, Sk = values.shape
    per_row = 16 // values.element_size()
    strides = values.stride()
    whole = all(s % per_row == 0 for n, s in zip(outer, strides, strict=False) if n > 1)
    if strides[-1] == 1 and whole and (strides[-2] or outer[-1] == 1) and values.data_ptr() % 16 == 0:
        return values
    buffer = values.new_empty(*outer, Sk + -Sk % per_row)
    return buffer[..., :Sk].copy_(values)


def scores_of(layout: Layout, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Scores:
    """The :class:`Scores` of a layout and bias, kept with the bias (or else the layout) for the next layer."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing or (bias is not None and bias.is_inference()):  # whether it was written to since, nobody can tell
        return Scores(layout, bias, dtype, device)
    numbers = (layout.q_len, layout.kv_len, layout.start, layout.stop, layout.causal, layout.window)
    # layouts without tensors are told apart by their numbers, others by what they are
    key = (dtype, numbers if layout.kind == FULL else None)
    kept: dict[Any, tuple[Layout, Scores]]
    if bias is None:
        kept = layout.scores
    else:
        version, kept = getattr(bias, _ATTRIBUTE, (-1, {}))
        if version != bias._version:
            kept = {}
            setattr(bias, _ATTRIBUTE, (bias._version, kept))
    known = kept.get(key)
    if known is None or (known[0] is not layout and layout.kind != FULL):
        known = kept[key] = (layout, Scores(layout, bias, dtype, device))
    else:
        known[1].settle()
    return known[1]
