"""Who computes attention over shared parts and over codes: our kernel where it runs, elsewhere matrix products over
each part, and what runs on numbers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .codes import unpack
from .devices import device_of, runs_triton
from .kernels.decode_operands import why_not
from .request import Operands
from .shared import CodedAs, Parted, Scales, for_part, mask_for_part

#: query tokens a row up to which going over the parts pays; more are a prompt's
MOST_QUERIES = 64


def attend_shared(
    q: Tensor,
    parted: Parted,
    *,
    scale: float,
    causal: bool = True,
    mask: Tensor | None = None,
    all_shared: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of a few query tokens [B, HQ, Sq, D] over keys of which rows have some in common; no gradients.

    Args:
        causal: the last query of a row sees all of its keys, the one before it one key less. With a mask: no matter.
        mask: bool [B or 1, HQ or 1, Sq, Sk], all that is to know of who sees whom.
        all_shared: every query sees all shared keys, and the mask is asked for the rows' own alone.

    Returns:
        [B, HQ, Sq, Dv].
    """
    way = shared_torch
    if has_kernel(q.device, q.dtype, q.shape[-1], parted.values.shape[-1]):
        from .kernels.shared_decode import shared_decode as way  # needs triton
    seen: Any = {"causal": causal, "mask": mask, "all_shared": all_shared}
    return way(q, parted, scale=scale, softcap=softcap, sinks=sinks, **seen)


def attend_codes(q: Tensor, parted: Parted, operands: Operands) -> Tensor:
    """Attention of a few query tokens [B, HQ, Sq, D] over codes of which no rows share any, read as they are.

    Only where :func:`has_kernel`. No gradients, no dropout, no packed documents.

    Returns:
        [B, HQ, Sq, Dv].
    """
    from .backends.triton_decode import over_codes  # needs triton

    return over_codes(q, parted, operands)


@functools.cache
def has_kernel(device: torch.device, dtype: torch.dtype, D: int, Dv: int) -> bool:
    """Whether our kernel takes such operands there (on a GPU: interpreted, products are faster)."""
    return runs_triton(device) and why_not(device_of(device), dtype, D, Dv) is None


def shared_torch(
    q: Tensor,
    parted: Parted,
    *,
    scale: float,
    causal: bool = True,
    mask: Tensor | None = None,
    all_shared: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """:func:`attend_shared` by matrix products: each part's keys are read once for all rows that begin with it."""
    B, HQ, Sq, _ = q.shape
    start = parted.shared_keys
    own = parted.keys.shape[2]
    seen = None
    if mask is not None:
        seen, mask = mask[..., start:], None if all_shared else mask
    elif causal and Sq > 1:
        i, j = torch.arange(Sq, device=q.device)[:, None], torch.arange(own, device=q.device)
        seen = (j <= own - Sq + i)[None, None]
    keys, values = _numbers(parted.keys, parted.values, parted.scales, parted.coded)
    results = [_over(q, keys, values, seen, scale, softcap)]
    for part in reversed(parted.shared):
        length = part.keys.shape[2]
        start -= length
        seen = None if mask is None else mask_for_part(mask, part.rows, start, length)
        keys, values = _numbers(part.keys, part.values, part.scales, parted.coded)
        found = _over(for_part(q, part.rows), keys, values, seen, scale, softcap)
        slot = part.rows.slot(q.device).long()
        results.append(tuple(_of_rows(t, Sq).index_select(0, slot) for t in found))  # type: ignore[arg-type]
    lses = torch.stack([lse for _, lse in results])  # [parts, B, HQ, Sq, 1]
    total = torch.logsumexp(lses, 0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(total.dtype).view(1, HQ, 1, 1))
    weights = torch.exp(lses - torch.where(total == float("-inf"), 0.0, total))
    out = torch.stack([out for out, _ in results]).mul_(weights).sum(0)
    return out.to(q.dtype)


def _numbers(keys: Tensor, values: Tensor, scales: Scales | None, coded: CodedAs | None) -> tuple[Tensor, Tensor]:
    """A part's keys and values as numbers."""
    if scales is None or coded is None:
        return keys, values
    kind, dtype = coded
    return unpack(keys, scales[0], kind.keys, dtype), unpack(values, scales[1], kind.values, dtype)


def _of_rows(found: Tensor, Sq: int) -> Tensor:
    """[R, HQ, N * Sq, Dv] as [R * N, HQ, Sq, Dv]."""
    return found.unflatten(2, (-1, Sq)).transpose(1, 2).flatten(0, 1)


def _over(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention over one part: (out [R, HQ, M, Dv], lse [R, HQ, M, 1]) in fp32, or fp64 for fp64."""
    R, HQ, M, _ = q.shape
    HKV, S = k.shape[1], k.shape[2]
    q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))  # what is merged is not rounded
    scores = (q.reshape(R, HKV, -1, q.shape[-1]) @ k.mT).mul_(scale)  # the heads of a group are rows of one product
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        full = mask.expand(R, HQ, M, S)
        scores.view(R, HQ, M, S).masked_fill_(~full, float("-inf"))
        # what nobody sees may hold anything, NaN too; 0 * NaN would be NaN
        v = v.masked_fill(~full.unflatten(1, (HKV, -1)).flatten(2, 3).any(2)[..., None], 0)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    scores = scores.sub_(torch.where(lse == float("-inf"), 0.0, lse)).exp_()
    out = scores @ v
    return out.view(R, HQ, M, -1), lse.view(R, HQ, M, 1)
