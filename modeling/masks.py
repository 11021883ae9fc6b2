"""The masks of GroupedQueryAttention: two conventions outside, one form inside.

``attention_mask`` is transformers': ones where a token may be seen. ``attn_mask`` and ``key_padding_mask`` are those of
``torch.nn.MultiheadAttention``: True where a key may NOT be seen. A name has one convention, whatever the shape, and
what could be read in two ways is refused.

Inside, a mask is [B or 1, HQ or 1, Sq or 1, Sk]: bool (True: may be seen) or float (added to the scores).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Masks(NamedTuple):
    """The masks of one call, as they were given."""

    attention_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    key_padding_mask: Tensor | None = None

    def resolve(self, sizes: tuple[int, int, int], known: int | None, exact: bool) -> Tensor | None:
        """All of them in the form that is used inside.

        Args:
            sizes: B, HQ and Sq.
            known: the number of keys, or with a cache the least that it can be; None if only the device knows.
            exact: there is no cache, so that no other number will do.

        Raises:
            ValueError: masks of both conventions, or one that does not fit or could be read in two ways.
        """
        if self.attention_mask is not None and (self.attn_mask is not None or self.key_padding_mask is not None):
            raise ValueError(
                "attention_mask says what may be seen, attn_mask and key_padding_mask what may not: "
                "give masks of one convention"
            )
        for name, mask in zip(self._fields, self, strict=True):
            broadcast = name == "attention_mask" and mask is not None and mask.dim() > 2 and mask.shape[-1] == 1
            if mask is not None and mask.dim() > 1 and not broadcast:
                require_length(name, mask.shape[-1], known, exact)
        if self.attention_mask is not None:
            return of_transformers(self.attention_mask, *sizes)
        if self.attn_mask is not None and self.key_padding_mask is not None:
            lengths = self.attn_mask.shape[-1], self.key_padding_mask.shape[-1]
            if lengths[0] != lengths[1]:
                raise ValueError(f"attn_mask is over {lengths[0]} keys, key_padding_mask over {lengths[1]}")
        return of_torch(self.attn_mask, self.key_padding_mask, *sizes)


def of_transformers(mask: Tensor, B: int, HQ: int, Sq: int) -> Tensor:
    """``attention_mask`` in the form that is used inside.

    Args:
        mask: [B, Sk], integers or bool; or bool or float, broadcastable to [B, HQ, Sq, Sk].

    Raises:
        ValueError: it could be read in two ways, or in none.
    """
    shape = tuple(mask.shape)
    if mask.dim() == 2 and shape[0] in (1, B):
        if mask.is_floating_point():
            raise ValueError(
                f"attention_mask {shape} of floats may be ones and zeros or scores to add: give ones and zeros as "
                "integers or bool, scores as key_padding_mask [B, Sk], attn_mask [Sq, Sk] or in four dimensions"
            )
        if mask.dtype == torch.bool and B == Sq > 1 and shape[0] == B:
            raise ValueError(
                f"attention_mask {shape} of bool may be [B, Sk] or [Sq, Sk], as there are {B} of both: give valid keys "
                "as integers or [B, 1, 1, Sk], and what each query sees as [1, 1, Sq, Sk]"
            )
        return mask.bool()[:, None, None, :]
    if mask.dim() == 3 and B == HQ > 1 and shape[0] == B:
        raise ValueError(
            f"attention_mask {shape} may be [B, Sq, Sk] or [HQ, Sq, Sk], as there are {B} of both: give it as "
            "[B, 1, Sq, Sk] or [1, HQ, Sq, Sk]"
        )
    wanted = (B, HQ, Sq)
    fits = all(n in (1, m) for n, m in zip(reversed(shape[:-1]), reversed(wanted), strict=False))
    if not 2 <= mask.dim() <= 4 or not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention_mask {shape} of {str(mask.dtype).removeprefix('torch.')}: it is [B, Sk] of ones and zeros, or "
            f"bool or float and broadcastable to [B, HQ, Sq, Sk] with B = {B}, HQ = {HQ}, Sq = {Sq}"
        )
    return mask.reshape((1,) * (4 - mask.dim()) + shape)


def of_torch(attn_mask: Tensor | None, key_padding_mask: Tensor | None, B: int, HQ: int, Sq: int) -> Tensor | None:
    """The masks of ``torch.nn.MultiheadAttention``, both together, in the form that is used inside.

    Args:
        attn_mask: [Sq, Sk] or [B * HQ, Sq, Sk]; key_padding_mask: [B, Sk]. Each bool (True: may not be seen) or float
            (added to the scores).

    Raises:
        ValueError: another shape or dtype.
    """
    parts = []
    for name, mask, fits in (
        ("attn_mask", attn_mask, "[Sq, Sk] or [B * HQ, Sq, Sk]"),
        ("key_padding_mask", key_padding_mask, "[B, Sk]"),
    ):
        if mask is None:
            continue
        if not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise ValueError(
                f"{name} of {str(mask.dtype).removeprefix('torch.')}: it is bool (True: may not be seen) or float "
                "(added to the scores); ones and zeros as transformers has them go into attention_mask"
            )
        if name == "key_padding_mask" and mask.dim() == 2 and mask.shape[0] == B:
            mask = mask[:, None, None, :]
        elif name == "attn_mask" and mask.dim() == 2 and mask.shape[0] == Sq:
            mask = mask[None, None]
        elif name == "attn_mask" and mask.dim() == 3 and mask.shape[:2] == (B * HQ, Sq):
            mask = mask.unflatten(0, (B, HQ))
        else:
            raise ValueError(
                f"{name} {tuple(mask.shape)}: it is {fits}, here with B = {B}, HQ = {HQ} query heads and Sq = {Sq}"
            )
        parts.append(~mask if mask.dtype == torch.bool else mask)
    if len(parts) == 2:
        return both(*parts)
    return parts[0] if parts else None


def both(mask: Tensor | None, other: Tensor) -> Tensor:
    """Two masks at once: bool if both are, else float."""
    if mask is None:
        return other
    if mask.dtype == other.dtype == torch.bool:
        return mask & other
    if mask.dtype == torch.bool or other.dtype == torch.bool:
        visible, scores = (mask, other) if mask.dtype == torch.bool else (other, mask)
        return scores.masked_fill(~visible, -torch.inf)
    return mask + other


def require_length(name: str, n: int, known: int | None, exact: bool) -> None:
    """Refuse a mask over ``n`` keys where there are ``known`` of them: so many, or (with a cache) at least so many."""
    if known is None or n == known or (n > known and not exact):
        return
    among = "there are" if exact else "with the cached ones there are"
    raise ValueError(f"{name} covers {n} keys, but {among} {known}{'' if exact else ': it counts both'}")


def over_keys(mask: Tensor, keys: Tensor) -> Tensor:
    """A mask over all keys so far, as one over those that a cache gives back.

    Args:
        keys: integers [Sk], the places of those keys. A static cache's last ones are empty and not in the mask; a
            sliding cache has let the first ones go.
    """
    n, Sk = mask.shape[-1], keys.shape[0]
    if n < Sk and n != 1:
        hidden = False if mask.dtype == torch.bool else -torch.inf
        return nn.functional.pad(mask, (0, Sk - n), value=hidden)
    return mask[..., keys] if n > Sk else mask
