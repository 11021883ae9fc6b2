"""Where the real tokens of a padded batch are, and the way from ``[B, S]`` to one packed row ``[1, T]`` and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

IGNORE = -100  # the label that transformers' losses leave out


@dataclass(frozen=True)
class Packing:
    """Where the T real tokens of a batch ``[B, S]`` are."""

    index: Tensor  # [T] into the B*S tokens, document after document
    first: Tensor  # [number of documents] into the T tokens: each document's first one
    cu_seq_lens: Tensor  # int32
    max_length: int
    shape: tuple[int, int]
    rows: Tensor  # [number of documents] the row of each
    left_aligned: bool  # every row begins with a real token
    right_aligned: bool  # every row ends in one

    def pack(self, tokens: Tensor) -> Tensor:
        """``[B, S, ...]`` -> ``[1, T, ...]``"""
        return tokens.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, name: str, value: Any) -> Any:
        """``[1, T, ...]`` -> ``[B, S, ...]`` and ``[T, ...]`` -> ``[B*S, ...]``, zero at the padding."""
        if isinstance(value, (tuple, list)):
            return type(value)(self.unpack(name, v) for v in value)
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        (B, S), T = self.shape, len(self.index)
        if value.shape[:2] == (1, T):
            return self._scatter(value[0]).unflatten(0, (B, S))
        if value.shape[0] == T:
            return self._scatter(value)
        raise ValueError(f"unpadded() cannot put the output {name} of shape {tuple(value.shape)} back into the batch")

    def last(self, tokens: Tensor) -> Tensor:
        """``[1, number of documents, ...]``, of each document's last token -> ``[B, 1, ...]``; if right_aligned."""
        return tokens[0].index_select(0, self.rows.argsort())[:, None]

    def spread_heads(self, states: Tensor) -> Tensor:
        """K or V ``[1, H, T, D]`` -> ``[B, H, S, D]``, zero at the padding."""
        return self._scatter(states[0].transpose(0, 1)).unflatten(0, self.shape).transpose(1, 2)

    def _scatter(self, tokens: Tensor) -> Tensor:
        B, S = self.shape
        return tokens.new_zeros(B * S, *tokens.shape[1:]).index_copy(0, self.index, tokens)


def pack_rows(
    mask: Tensor, positions: Tensor, targets: Tensor | None = None, *, shifted: bool = False, strict: bool = False
) -> Packing | None:
    """The layout of a 2-D mask ``[B, S]`` (nonzero: real), or None if nothing is padding. Waits for the device once.

    Args:
        positions: position ids ``[B, S]``. Documents are put in an order in which no document's first position follows
            the last one of the document before, because transformers' own masks find borders by that.
        targets: labels ``[B, S]``, if there are any; ``shifted``: whether a label is the target of the token before.
        strict: whether positions must count up by one inside each row (see :func:`unpadded`).

    Raises:
        ValueError: as :func:`unpadded` says.
    """
    (B, S), device = mask.shape, mask.device
    real = mask != 0
    lengths, first = real.sum(1), real.int().argmax(1)
    last = S - 1 - real.flip(1).int().argmax(1)
    gaps = ((last - first + 1 != lengths) & (lengths > 0)).sum()
    both = real[:, 1:] & real[:, :-1]
    jumps = ((positions.diff(dim=1) != 1) & both).sum()
    lost = torch.zeros_like(gaps)
    if targets is not None:
        # of shifted labels the first column is nobody's target, and the others need the token before
        wanted, served = (targets[:, 1:], both) if shifted else (targets, real)
        lost = ((wanted != IGNORE) & ~served).sum()
    order = positions.gather(1, first[:, None])[:, 0].argsort(descending=True, stable=True)
    host: list[int] = torch.cat(
        [torch.stack([gaps, jumps, lost, real[:, 0].sum(), real[:, -1].sum()]), lengths[order]]
    ).tolist()
    if host[0]:
        raise ValueError("attention_mask has padding between real tokens, which unpadded() cannot pack: pad at one end")
    if strict and host[1]:
        raise ValueError(
            "position_ids do not count up by one inside a row, and this attention implementation finds the borders of "
            "documents by them: switch the model with hf_attn_patch.enable(model), which is given the borders"
        )
    if host[2]:
        raise ValueError(
            f"{host[2]} labels stand on padding tokens or would be predicted from them; unpadded() leaves those out: "
            f"set these labels to {IGNORE}, or drop them with unpadded(model, drop_padding_targets=True)"
        )
    documents = [n for n in host[5:] if n]
    T = sum(documents)
    if T in (0, B * S):
        return None
    borders = [0]
    for n in documents:
        borders.append(borders[-1] + n)
    # a stable sort brings the real tokens to the front in their order, and its size need not be asked of the device
    front = real[order].flatten().to(torch.int8).argsort(descending=True, stable=True)[:T]
    index = (order[:, None] * S + torch.arange(S, device=device)).flatten()[front]
    cu_seq_lens = torch.tensor(borders, dtype=torch.int32).to(device, non_blocking=True)
    rows = order[torch.tensor([n > 0 for n in host[5:]]).nonzero()[:, 0].to(device, non_blocking=True)]
    return Packing(
        index, cu_seq_lens[:-1].long(), cu_seq_lens, max(documents), (B, S), rows, host[3] == B, host[4] == B
    )


class PackedPrefill(Cache):
    """Stands for an empty cache during one packed forward: attention gets the packed K and V ``[1, H, T, D]``, and the
    cache the padded ``[B, H, S, D]``, so that what follows finds what a padded forward would have left."""

    def __init__(self, cache: Cache, packing: Packing) -> None:
        super().__init__(layers=cache.layers)
        self.cache, self.packing = cache, packing

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        spread = self.packing.spread_heads
        self.cache.update(spread(key_states), spread(value_states), layer_idx, *args, **kwargs)
        return key_states, value_states
