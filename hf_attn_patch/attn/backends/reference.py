"""The truth: plain einsum in fp32 (fp64 for fp64 inputs), KV heads as they are. Slow, and never refuses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_attn_patch.attn.request import AttentionRequest, Operands

from ._common import cut, cut_bias
from ._unseen import without_unseen

#: without gradients, queries are taken in blocks of so many scores, so that Sq x Sk never stands whole
BLOCK_SCORES = 1 << 24


def missing() -> str | None:
    """It is there wherever torch is."""
    return None


def refuses(request: AttentionRequest) -> str | None:
    """Never."""
    return None


def run(q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """q [B, HQ, Sq, D], k [B, HKV, Sk, D], v [B, HKV, Sk, Dv] -> (out [B, HQ, Sq, Dv], weights or None)."""
    if torch.is_autocast_enabled(q.device.type):  # which would take the wide operands back to half precision
        with torch.autocast(q.device.type, enabled=False):
            return run(q, k, v, request, operands)
    seen = operands.visibility
    k, v = cut(seen, k, v)
    mask = seen.dense(q.device)
    bias = None if operands.bias is None else cut_bias(seen, operands.bias)
    k, v = without_unseen(seen, operands.bias, k, v)
    rows = q.shape[2]
    if not (request.grad or request.weights or request.tracing):
        rows = max(1, BLOCK_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    if rows >= q.shape[2]:
        out, weights = _block(q, k, v, mask, bias, request, operands)
        if weights is not None and not seen.whole:  # the keys that were cut off have weights of zero
            weights = F.pad(weights, (seen.start, seen.kv_len - seen.start - seen.keys))
        return out, weights
    outs = []
    for i in range(0, q.shape[2], rows):
        part = [t if t is None or t.shape[2] == 1 else t[:, :, i : i + rows] for t in (mask, bias)]
        outs.append(_block(q[:, :, i : i + rows], k, v, part[0], part[1], request, operands)[0])
    return torch.cat(outs, 2), None


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    request: AttentionRequest,
    operands: Operands,
) -> tuple[Tensor, Tensor | None]:
    (B, HQ, Sq, D), HKV = q.shape, k.shape[1]
    G = HQ // HKV
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q.reshape(B, HKV, G, Sq, D).to(wide), k.to(wide)).flatten(1, 2)
    scores = scores * operands.scale
    if operands.softcap is not None:
        scores = operands.softcap * torch.tanh(scores / operands.softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True) if k.shape[2] else scores.new_full((B, HQ, Sq, 1), -torch.inf)
    sink = None
    if operands.sinks is not None:
        sink = operands.sinks.to(wide)[None, :, None, None]
        top = torch.maximum(top, sink.detach())
    top = top.clamp(min=torch.finfo(wide).min)  # a row that sees nothing: exp(-inf - finite) is 0, not NaN
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    weights = weights / torch.where(total == 0, 1.0, total)
    dropped = F.dropout(weights, operands.dropout) if operands.dropout else weights
    out = torch.einsum("bhgqk,bhkd->bhgqd", dropped.reshape(B, HKV, G, Sq, k.shape[2]), v.to(wide)).flatten(1, 2)
    return out.to(q.dtype), (dropped.to(q.dtype) if request.weights else None)
