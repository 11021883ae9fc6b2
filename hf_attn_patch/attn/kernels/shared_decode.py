"""Decoding over keys that rows have in common: each part's keys are read once for all rows that begin with it.

To ``decode_kernel.py`` the queries of all rows of a prompt are the queries of one row, which see all of its keys: with
N rows of G query heads a KV head, one tile of N x G. What rows have of their own is read as always, and
``merge.py`` puts the results together. The plain truth: ``grouped_decode_reference`` over the keys put together.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_attn_patch.attn import memo
from hf_attn_patch.attn.shared import Parted, Rows, for_part, mask_for_part

from .decode_launch import SHORT, DecodeOperands, launch
from .mask_bounds import mask_bounds
from .merge import merge

_Masked = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def shared_decode(
    q: torch.Tensor,
    parted: Parted,
    *,
    scale: float,
    causal: bool = True,
    mask: torch.Tensor | None = None,
    all_shared: bool = False,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of a few query tokens a row, forward only.

    Args:
        q: [B, HQ, Sq, D], fp16, bf16 or fp32.
        parted: the keys and values, R rows of shared parts and B rows of their own.
        scale, softcap, sinks: as in :func:`.decode.grouped_decode`.
        causal: the last query of a row sees all of its keys, the one before it one key less. With a mask: no matter.
        mask: bool [B or 1, HQ or 1, Sq, Sk], True where a query may look: all that is to know.
        all_shared: every query sees all shared keys, and the mask is asked for the rows' own alone.

    Returns:
        [B, HQ, Sq, Dv] in q's dtype (laid out as [B, Sq, HQ, Dv]); zeros for queries that see no key.

    Raises:
        ValueError: as :func:`.decode.grouped_decode`.
    """
    start = sum(part.keys.shape[2] for part in parted.shared)
    own: Any = (None, None, None)
    if mask is not None:
        own, causal = _own_mask(mask, start, len(q)), False
    if all_shared:
        mask = None
    options = (scale, causal, None, softcap, True)
    result = _over(q, parted.keys, parted.values, own, sinks, options)
    options = (scale, False, None, softcap, True)
    for part in reversed(parted.shared):
        length = part.keys.shape[2]
        start -= length
        seen = (None, None, None) if mask is None else _part_mask(mask, part.rows, start, length)
        found = _over(for_part(q, part.rows), part.keys, part.values, seen, None, options)
        slot = None if part.rows.even else part.rows.slot(q.device)
        last = part is parted.shared[0]
        out, lse = merge(found, slot, part.rows.most, result, q.dtype if last else torch.float32, with_lse=not last)
        result = out, lse if lse is not None else result[1]
    return result[0]


def _over(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: Any,
    sinks: torch.Tensor | None,
    options: tuple[float, bool, None, float | None, bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over one part, in fp32, and the logs of its denominators."""
    mask, first, end = seen
    out, lse = launch(DecodeOperands(q, k, v, None, first, end, mask, None, sinks, *options), wide=True)
    assert lse is not None
    return out, lse


def _part_mask(mask: torch.Tensor, rows: Rows, start: int, length: int) -> _Masked:
    """The mask over a part's keys, and where it begins and ends; worked out by the first of a forward's layers."""
    key = ("part", id(rows), start, length)
    known: tuple[Rows, _Masked] | None = memo.recall(mask, key)
    if known is None or known[0] is not rows:
        with memo.counted():
            known = rows, _bounded(mask_for_part(mask.detach(), rows, start, length))
        memo.keep(mask, key, known)
    return known[1]


def _own_mask(mask: torch.Tensor, start: int, batch: int) -> _Masked:
    key = ("own", start, batch)
    known: _Masked | None = memo.recall(mask, key)
    if known is None:
        with memo.counted():
            known = _bounded(mask.detach()[..., start:].expand(batch, -1, -1, -1))
        memo.keep(mask, key, known)
    return known


def _bounded(mask: torch.Tensor) -> _Masked:
    return (mask, *mask_bounds(mask)) if mask.shape[-1] > SHORT else (mask, None, None)
