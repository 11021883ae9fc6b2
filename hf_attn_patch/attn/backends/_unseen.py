"""Keys that nobody sees may hold anything, NaN and infinity included; 0 * NaN is NaN, so no kernel may meet them.

A key is unseen where no query of its KV head looks: by the seen, by an additive -inf, or by both together. One under
a dtype's lowest number, the other way to write a mask, has a weight of exactly zero in each row that sees another key.
A row that sees no other has the softmax of what it adds, as in torch, so finite values stay as they are there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.attn import memo
from hf_attn_patch.attn.devices import runs_triton
from hf_attn_patch.attn.visibility import Dense, Full, Packed, Padded, Visibility
from hf_attn_patch.compat.torch import transforms

from ._common import cut_bias


def without_unseen(seen: Visibility, bias: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [B, HKV, Sk, D] (already cut) with zeros where no query looks; the gradient there is exactly zero."""
    if 0 in (seen.q_len, seen.keys):
        return k, v
    if bias is not None:
        return Unseen.under(peaks_of(seen, bias, k.device), bias.dtype).clean(k, v)
    dead = seen.dead_keys(k.device)
    if dead is None:
        return k, v
    dead = _per_kv_head(dead, k.shape[1])
    return k.masked_fill(dead, 0), v.masked_fill(dead, 0)


def without_unseen_of_documents(seen: Packed, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`without_unseen` for packed documents, where most often there are no such keys: nothing waits to know."""
    if memo.capturing(k.device):
        return without_unseen(seen, None, k, v)
    unseen = seen.form("unseen", lambda: Unseen(seen.dead_keys(k.device)))
    unseen.settle()
    return unseen.clean(k, v)


def peaks_of(seen: Visibility, bias: Tensor, device: torch.device) -> Tensor:
    """[B or 1, HQ or 1, Sk or 1]: what is added to a key's scores at most, -inf where the seen hides it from all."""
    bias = cut_bias(seen, bias.detach())
    if isinstance(seen, (Dense, Packed)) and (bias.shape[2] > 1 or _by_head(seen)):
        mask = seen.dense(device)
        return (bias if mask is None else bias.masked_fill(~mask, -torch.inf)).amax(2)
    # which keys a row has does not depend on the query: no mask of B x Sq x Sk is needed
    if bias.shape[2] == 1:
        peaks = bias[:, :, 0]
    elif isinstance(seen, (Full, Padded)) and seen.banded:
        peaks = bias.masked_fill(~seen.band(device), -torch.inf).amax(2)
    else:
        peaks = bias.amax(2)
    dead = seen.dead_keys(device)
    return peaks if dead is None else peaks.masked_fill(dead, -torch.inf)


def _by_head(seen: Visibility) -> bool:
    return isinstance(seen, Dense) and seen.mask.shape[1] > 1


class Unseen:
    """The unseen keys of one mask or bias, and the queries that see none.

    On a GPU all three stay tensors until the device has said, unasked, that there are none: nothing waits for it.

    Args:
        dead: bool [B or 1, HQ or 1, Sk or 1], keys that nothing shows.
        low: bool, alike, keys that are under a dtype's lowest number wherever they are shown.
        blind: bool [B or 1, HQ or 1, Sq, 1], kept for who asks for it.
    """

    __slots__ = ("_asked", "_flags", "_said", "blind", "dead", "low")

    def __init__(self, dead: Tensor, low: Tensor | None = None, blind: Tensor | None = None) -> None:
        self.dead: Tensor | None = dead
        self.low, self.blind = low, blind
        self._asked: Any = None
        self._flags: dict[int, Tensor] = {}
        if torch.compiler.is_compiling() or transforms() is not None:
            return
        self._said = torch.stack([dead.any() if t is None else t.any() for t in (dead, low, blind)])
        if dead.device.type == "cpu":
            self._listen()
        elif dead.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self._said = self._said.to("cpu", non_blocking=True)
            self._asked = torch.cuda.Event()
            self._asked.record()

    @classmethod
    def under(cls, peaks: Tensor, dtype: torch.dtype, blind: Tensor | None = None) -> Unseen:
        """Of ``peaks`` [B or 1, HQ or 1, Sk or 1], what is added to a key's scores at most, in ``dtype``."""
        dead = peaks == -torch.inf
        # half of the lowest: a bias on top of it may have taken it up a little
        return cls(dead, (peaks <= torch.finfo(dtype).min / 2) & ~dead, blind)

    def _listen(self) -> None:
        found = zip((self.dead, self.low, self.blind), self._said.tolist(), strict=True)
        self.dead, self.low, self.blind = (t if some else None for t, some in found)
        self._asked = None

    def settle(self) -> None:
        """Drop what the device has found to be empty, if it has said so by now."""
        if self._asked is not None and self._asked.query():
            self._listen()

    def clean(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V with zeros where nobody looks."""
        if self.low is None and self.dead is None:
            return k, v
        if _by_kernel(k):
            grad = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
            made: tuple[Tensor, Tensor] = (_Cleaned.apply if grad else cleaned_by_kernel)(k, v, self.flags(k.shape[1]))
            return made
        if self.low is not None:
            low = _per_kv_head(self._low_or_dead(), k.shape[1])
            k, v = (t.masked_fill(low & ~t.isfinite(), 0) for t in (k, v))
        if self.dead is not None:
            dead = _per_kv_head(self.dead, k.shape[1])
            k, v = (t.masked_fill(dead, 0) for t in (k, v))
        return k, v

    def flags(self, HKV: int) -> Tensor:
        """What is known of each key, uint8 [B or 1, HKV or 1, Sk or 1], as the kernel takes it."""
        found = self._flags.get(HKV)
        if found is None:
            if self.low is None:
                assert self.dead is not None
                found = _per_kv_head(self.dead, HKV)[..., 0].to(torch.uint8)
            else:
                found = _per_kv_head(self._low_or_dead(), HKV)[..., 0].to(torch.uint8) * 2
                if self.dead is not None:
                    found = found.masked_fill(_per_kv_head(self.dead, HKV)[..., 0], 1)
            self._flags[HKV] = found
        return found

    def _low_or_dead(self) -> Tensor:
        """Of a group, some heads may not be shown a key at all that for the others is under the lowest number."""
        assert self.low is not None
        return self.low if self.dead is None else self.low | self.dead


def _by_kernel(k: Tensor) -> bool:
    """Whether one kernel can do it: torch takes a dozen, of all keys and values each."""
    return (
        type(k) is Tensor
        and k.is_cuda
        and not torch.compiler.is_compiling()
        and transforms() is None
        and runs_triton(k.device)
    )


def cleaned_by_kernel(k: Tensor, v: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
    from hf_attn_patch.attn.kernels.clean import cleaned

    return cleaned(k, v, flags)


class _Cleaned(torch.autograd.Function):
    """The gradient goes on as it comes: what nobody sees has a weight of exactly zero, and so has its gradient."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
        return cleaned_by_kernel(k, v, flags)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*grads, None)


def _per_kv_head(unseen: Tensor, HKV: int) -> Tensor:
    """[B or 1, HQ or 1, Sk or 1] -> [B or 1, HKV or 1, Sk or 1, 1]: unseen by all of a group."""
    if unseen.shape[1] not in (1, HKV):
        unseen = unseen.unflatten(1, (HKV, -1)).all(2)
    return unseen[..., None]
