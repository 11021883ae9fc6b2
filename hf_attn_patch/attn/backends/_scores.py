"""Masks and biases as one float tensor of scores to add, for kernels that take no better description.

T5's bias is the same tensor in all layers, and so is a mask. What a kernel wants of them (one dtype, aligned rows,
which queries see nothing and which keys nobody sees) is worked out at the first layer and kept with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from hf_attn_patch.attn import memo
from hf_attn_patch.attn.visibility import FULL, Layout

from ._common import as_dtype, cut_bias
from ._unseen import Unseen, peaks_of

T = TypeVar("T", "Scores", Unseen)


class Scores:
    """What is added to the scores of one layout, float [B or 1, HQ or 1, Sq, Sk].

    ``blind`` (bool [B or 1, HQ or 1, Sq, 1]) marks the queries that see no key; ``unseen`` knows the keys that no query
    sees. On a GPU ``blind`` stays a tensor until the device has said, unasked, that there are none.
    """

    __slots__ = ("unseen", "values")

    def __init__(self, layout: Layout, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        mask = layout.dense(device)
        if bias is None:
            assert mask is not None
            zero = torch.zeros((), dtype=dtype, device=device)
            values = zero.expand(mask.shape).masked_fill(~mask, -torch.inf)
        else:
            values = as_dtype(cut_bias(layout, bias.detach()), dtype)  # no view of what it is kept with
            if mask is not None:
                values = values.masked_fill(~mask, -torch.inf)
        values = values.expand(*values.shape[:2], layout.q_len, layout.keys)
        self.values = _aligned(values)
        self.unseen = Unseen(values.amax(2), dtype, blind=values.amax(-1, keepdim=True) == -torch.inf)

    @property
    def blind(self) -> Tensor | None:
        return self.unseen.blind

    def settle(self) -> None:
        """Drop what the device has found to be empty, if it has said so by now."""
        self.unseen.settle()

    def clean(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V with zeros where nobody looks, so that NaN cannot leak from there."""
        return self.unseen.clean(k, v)


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
    return _kept(layout, bias, device, dtype, lambda: Scores(layout, bias, dtype, device))


def unseen_of(layout: Layout, bias: Tensor, device: torch.device) -> Unseen:
    """The keys that nobody sees under a layout and bias, kept with the bias for the next layer."""
    return _kept(layout, bias, device, None, lambda: Unseen(peaks_of(layout, bias, device), bias.dtype))


def _kept(
    layout: Layout, bias: Tensor | None, device: torch.device, dtype: torch.dtype | None, make: Callable[[], T]
) -> T:
    """What ``make`` makes of a layout and bias, or what it made of them before."""
    numbers = (layout.q_len, layout.kv_len, layout.start, layout.stop, layout.causal, layout.window)
    # layouts without tensors are told apart by their numbers, others by what they are
    key = ("scores", dtype, numbers if layout.kind == FULL else None)
    if bias is None and memo.capturing(device):
        return make()
    known: tuple[Layout, T] | None = layout.scores.get(key) if bias is None else memo.recall(bias, key)
    if known is not None and (known[0] is layout or layout.kind == FULL):
        known[1].settle()
        return known[1]
    made = make()
    if bias is None:
        layout.scores[key] = (layout, made)
    else:
        memo.keep(bias, key, (layout, made))
    return made
