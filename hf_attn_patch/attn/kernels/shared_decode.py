"""Decoding over keys that rows have in common: each part's keys are read once for all rows that begin with it.

To ``decode_kernel.py`` the queries of all rows of a prompt are the queries of one row, which see all of its keys: with
N rows of G query heads a KV head, one tile of N x G. What rows have of their own is read as always, and
``merge.py`` puts the results together. The plain truth: ``grouped_decode_reference`` over the keys put together.

A mask over shared keys nearly always says the same for all rows of a prompt (its padding), and a kernel that reads one
row of it is faster by far than one that reads a row for each query. Which of the two it is, only the device knows. So
both are started, and for each prompt one of them is told that there are no keys: its result weighs nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_attn_patch.attn import memo
from hf_attn_patch.attn.codes import as_codes
from hf_attn_patch.attn.shared import CodedAs, Parted, Rows, Scales, for_part, mask_for_part
from hf_attn_patch.compat.torch import operators_are_watched

from .decode_launch import SHORT, launch
from .decode_operands import SCHEMA, DecodeOperands
from .mask_bounds import mask_bounds
from .merge import merge

_Masked = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
_ALL: _Masked = (None, None, None)


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
    start = parted.shared_keys
    own = _ALL
    if mask is not None:
        own, causal = _own_mask(mask, start, len(q)), False
    if all_shared:
        mask = None
    options = (scale, causal, None, softcap, True)
    tensors = parted.keys, parted.values, parted.scales, parted.coded
    result = _over(q, tensors, own, sinks, options)
    options = (scale, False, None, softcap, True)
    for part in reversed(parted.shared):
        length = part.keys.shape[2]
        start -= length
        ways = [_ALL] if mask is None else _part_masks(mask, part.rows, start, length)
        slot = None if part.rows.even else part.rows.slot(q.device)
        for seen in ways:
            tensors = part.keys, part.values, part.scales, parted.coded
            found = _over(for_part(q, part.rows), tensors, seen, None, options)
            last = part is parted.shared[0] and seen is ways[-1]
            dtype = q.dtype if last else torch.float32
            out, lse = merge(found, slot, part.rows.most, result, dtype, with_lse=not last)
            result = out, lse if lse is not None else result[1]
    return result[0]


def _over(
    q: torch.Tensor,
    tensors: tuple[torch.Tensor, torch.Tensor, Scales | None, CodedAs | None],
    seen: _Masked,
    sinks: torch.Tensor | None,
    options: tuple[float, bool, None, float | None, bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over one part, in fp32, and the logs of its denominators."""
    (k, v, scales, coded), (mask, first, end) = tensors, seen
    k_scale, v_scale = (None, None) if scales is None else (t.squeeze(-1) for t in scales)
    if coded is not None:
        k, v = as_codes(k, coded.kind.keys), as_codes(v, coded.kind.values)
    operands = DecodeOperands(q, k, v, None, first, end, mask, None, sinks, k_scale, v_scale, *options)
    found: tuple[torch.Tensor, torch.Tensor]
    found = torch.ops.hf_attn_patch.decode_part(*operands) if operators_are_watched() else _part(*operands)
    return found


def _part(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = launch(DecodeOperands(*operands), wide=True)
    assert lse is not None
    return out, lse


_decode_part = torch.library.custom_op("hf_attn_patch::decode_part", _part, mutates_args=(), schema=SCHEMA)


@_decode_part.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    B, HQ, Sq, _ = q.shape
    out = q.new_empty((B, Sq, HQ, v.shape[-1]), dtype=torch.float32).transpose(1, 2)
    return out, q.new_empty((B, HQ, Sq), dtype=torch.float32)


def _part_masks(mask: torch.Tensor, rows: Rows, start: int, length: int) -> list[_Masked]:
    """How to go over a part's keys: masks, and where they begin and end. Worked out once a forward."""
    key = ("part", id(rows), start, length)
    known: tuple[Rows, list[_Masked]] | None = memo.recall(mask, key)
    if known is None or known[0] is not rows:
        with memo.counted():
            known = rows, _ways(mask_for_part(mask.detach(), rows, start, length))
        memo.keep(mask, key, known)
    return known[1]


def _ways(mask: torch.Tensor) -> list[_Masked]:
    """A part's mask [R, HQ or 1, M, S] as one row for all M queries; and as it is, for the rows of the part where they
    differ. Of each, the end of its keys is 0 where the other one counts."""
    if mask.shape[1] > 1 or mask.stride(2) == 0 or mask.shape[2] == 1:
        return [_bounded(mask)]
    one = mask[:, :, :1]
    alike = (mask == one).flatten(1).all(1)
    first, end = mask_bounds(one)
    zero = torch.zeros_like(end)
    one = one.expand(-1, -1, mask.shape[2], -1)
    return [(one, first, end.where(alike, zero)), (mask, zero, (zero + mask.shape[-1]).where(~alike, zero))]


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
