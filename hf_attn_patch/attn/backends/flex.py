"""``torch.nn.attention.flex_attention``, compiled: softcap, bias with gradient, sinks and any mask, on CUDA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.attn.devices import lacks, needs_nvidia, no_bf16
from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.attn.visibility import DENSE, Dense, Full, Packed, Visibility
from hf_attn_patch.compat.torch import recompile_limit

from ._common import as_dtype, cut, cut_bias, rescale_by_sinks
from ._flex_tiles import tiles
from ._scores import unseen_of
from ._unseen import without_unseen

_BLOCK = 128
#: shapes that are compiled; past dynamo's own limit of 8 flex would run unfused, with all scores in memory
_SHAPES = 1024


def missing() -> str | None:
    """Why it cannot run here, or None."""
    return None if torch.cuda.is_available() and torch.version.hip is not None else lacks(75)


def refuses(request: AttentionRequest) -> str | None:
    """Why not, or None."""
    if request.device not in ("cuda", "hip"):
        return "needs a CUDA device (its CPU code has no backward)"
    if request.device == "cuda" and (reason := needs_nvidia(request, 75) or no_bf16(request, request.dtype)):
        return reason
    if not request.half:
        return f"its dots are not exact in {str(request.dtype).removeprefix('torch.')}"
    if request.dropout:
        return "flex_attention has no dropout"
    if request.weights:
        return "flex_attention returns no attention weights"
    if request.head_dim > 256 or request.value_dim > 256 or request.head_dim < 16:
        return "takes head_dim 16 to 256"
    if request.deterministic and request.bias_grad:
        return "the gradient of a captured bias is summed atomically"
    if request.per_head_mask:
        return "takes one mask for all heads"
    if request.tracing:
        return "a block mask cannot be built inside a compiled graph"
    return None


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        with recompile_limit(_SHAPES):
            return compiled(*args, **kwargs)

    return call


def run(q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands) -> tuple[Tensor, None]:
    """q [B, HQ, Sq, D], k [B, HKV, Sk, D], v [B, HKV, Sk, Dv] -> (out [B, HQ, Sq, Dv], None)."""
    seen = operands.visibility
    k, v = cut(seen, k, v)
    if operands.bias is not None:
        k, v = unseen_of(seen, operands.bias, k.device).clean(k, v)
        if request.grad:
            operands = operands._replace(bias=_captured(operands.bias, q.dtype))
    elif not isinstance(seen, Full):
        k, v = without_unseen(seen, None, k, v)
    out, lse = _compiled()(
        q,
        k,
        v,
        score_mod=_score_mod(operands, seen),
        block_mask=_block_mask(seen, q.device),
        scale=operands.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_lse=True,
        kernel_options=_kernel_options(request, q.shape[2]),
    )
    if operands.sinks is not None:
        out = rescale_by_sinks(out, lse, operands.sinks)
    return out, None


def _kernel_options(request: AttentionRequest, queries: int) -> dict[str, Any] | None:
    scored = request.bias or request.visibility == DENSE
    options: dict[str, Any] = dict(tiles(request.capability, request.head_dim, request.value_dim, scored))
    if queries < _BLOCK:  # flex would take its decoding kernel, which has no choice for many shapes
        options["FORCE_USE_FLEX_ATTENTION"] = True
    return options or None


def _captured(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias as a backward may capture it: in the dtype of the queries.

    Inductor adds up a captured tensor's gradient atomically in fp32, whatever its dtype, and rounds the sum once. But
    one that is wider than the scores it is added to fails in the backward (seen with torch 2.11 on an H100).
    """
    return as_dtype(bias, dtype)


def _capped(softcap: float) -> Callable[..., Tensor]:
    return lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)


def _score_mod(operands: Operands, seen: Visibility) -> Callable[..., Tensor] | None:
    softcap = operands.softcap
    if operands.bias is None:
        return None if softcap is None else _capped(softcap)
    bias = cut_bias(seen, operands.bias)
    one = [n == 1 for n in bias.shape]

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        index = [x * 0 if single else x for x, single in zip((b, h, i, j), one, strict=True)]
        return score + bias[index[0], index[1], index[2], index[3]]

    return biased


def _block_mask(seen: Visibility, device: torch.device) -> Any:
    """The visibility as flex's block mask, built once and kept with it."""
    if isinstance(seen, Full) and not seen.banded:
        return None

    def make() -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        mask_mod, batch = _mask_mod(seen, device)
        return create_block_mask(mask_mod, batch, None, seen.q_len, seen.keys, device=str(device), BLOCK_SIZE=_BLOCK)

    return seen.form("block mask", make, device)


def _mask_mod(seen: Visibility, device: torch.device) -> tuple[Callable[..., Tensor], int | None]:
    if isinstance(seen, (Dense, Packed)):
        mask = seen.dense(device).expand(seen.batch, -1, -1, -1)
        return lambda b, h, i, j: mask[b, 0, i, j], seen.batch
    left, right = seen.sides
    shift = seen.keys - seen.q_len

    def band(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        visible = j >= 0
        if right is not None:
            visible = visible & (j <= i + shift + right)
        if left is not None:
            visible = visible & (j >= i + shift - left)
        return visible

    if isinstance(seen, Full):
        return band, None
    first, end = seen.bounds
    return lambda b, h, i, j: band(b, h, i, j) & (j >= first[b]) & (j < end[b]), seen.batch
