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
from hf_attn_patch.attn.visibility import Full, Visibility

from ._common import as_dtype, cut_bias
from ._unseen import Unseen, peaks_of

T = TypeVar("T", "Scores", Unseen)


class Scores:
    """What is added to the scores of one visibility, float [B or 1, HQ or 1, Sq, Sk].

    ``blind`` (bool [B or 1, HQ or 1, Sq, 1]) marks the queries that see no key; ``unseen`` knows the keys that no query
    sees. On a GPU ``blind`` stays a tensor until the device has said, unasked, that there are none.
    """

    __slots__ = ("unseen", "values")

    def __init__(self, seen: Visibility, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        mask = seen.dense(device)
        if bias is None:
            values = torch.zeros((), dtype=dtype, device=device).expand(1, 1, seen.q_len, seen.keys)
        else:
            values = as_dtype(cut_bias(seen, bias.detach()), dtype)  # no view of what it is kept with
        if mask is not None:
            values = values.masked_fill(~mask, -torch.inf)
        values = values.expand(*values.shape[:2], seen.q_len, seen.keys)
        self.values = _aligned(values)
        self.unseen = Unseen.under(values.amax(2), dtype, blind=values.amax(-1, keepdim=True) == -torch.inf)

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


def readable_of(seen: Visibility, bias: Tensor) -> Tensor:
    """A bias (cut) whose rows of keys are aligned, kept with it for the next layer where it had to be copied."""
    cut = cut_bias(seen, bias.detach())
    per_row = 16 // cut.element_size()
    strides = zip(cut.shape, cut.stride(), strict=True)
    aligned = all(n == 1 or s % per_row == 0 for n, s in list(strides)[:-1]) and cut.data_ptr() % 16 == 0
    if cut.shape[-1] == 1 or (aligned and cut.stride(-1) == 1):
        return cut
    key = ("aligned rows", seen.start, seen.stop)
    known: Tensor | None = memo.recall(bias, key)
    if known is None:
        known = _aligned(cut)
        memo.keep(bias, key, known)
    return known


def scores_of(seen: Visibility, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Scores:
    """The :class:`Scores` of a visibility and bias, kept with the bias (or else the visibility) for the next layer."""

    def make() -> Scores:
        return Scores(seen, bias, dtype, device)

    if bias is not None:
        return _kept(seen, bias, dtype, make)
    if memo.capturing(device):
        return make()
    found = seen.form(("scores", dtype), make, device)
    found.settle()
    return found


def unseen_of(seen: Visibility, bias: Tensor, device: torch.device) -> Unseen:
    """The keys that nobody sees under a visibility and bias, kept with the bias for the next layer."""
    return _kept(seen, bias, None, lambda: Unseen.under(peaks_of(seen, bias, device), bias.dtype))


def _kept(seen: Visibility, bias: Tensor, dtype: torch.dtype | None, make: Callable[[], T]) -> T:
    """What ``make`` makes of a visibility and bias, or what it made of them before."""
    by_numbers = isinstance(seen, Full)  # told apart by their numbers, the others by what they are
    numbers = (seen.q_len, seen.kv_len, seen.start, seen.stop, seen.causal, seen.window)
    key = ("scores", dtype, numbers if by_numbers else None)
    known: tuple[Visibility, T] | None = memo.recall(bias, key)
    if known is not None and (known[0] is seen or by_numbers):
        known[1].settle()
        return known[1]
    made = make()
    memo.keep(bias, key, (seen, made))
    return made
