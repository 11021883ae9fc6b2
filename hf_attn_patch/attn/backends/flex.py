"""``torch.nn.attention.flex_attention``, compiled: softcap, bias with gradient, sinks and any mask, on CUDA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.attn import memo
from hf_attn_patch.attn.devices import lacks, needs_nvidia, no_bf16
from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.attn.visibility import DENSE, FULL, PACKED, PADDED, Layout
from hf_attn_patch.compat.torch import recompile_limit

from ._common import cut, cut_bias, rescale_by_sinks
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
    layout = operands.layout
    k, v = cut(layout, k, v)
    if operands.bias is not None:
        k, v = unseen_of(layout, operands.bias, k.device).clean(k, v)
    elif layout.kind != FULL:
        k, v = without_unseen(layout, None, k, v)
    out, lse = _compiled()(
        q,
        k,
        v,
        score_mod=_score_mod(operands, layout),
        block_mask=_block_mask(layout, q.device),
        scale=operands.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_lse=True,
        # below 128 queries flex would take its decoding kernel, which has no choice for many shapes
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True} if q.shape[2] < _BLOCK else None,
    )
    if operands.sinks is not None:
        out = rescale_by_sinks(out, lse, operands.sinks)
    return out, None


def _score_mod(operands: Operands, layout: Layout) -> Callable[..., Tensor] | None:
    softcap = operands.softcap
    bias = None if operands.bias is None else cut_bias(layout, operands.bias)
    if softcap is None and bias is None:
        return None
    if bias is None:

        def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert softcap is not None
            return softcap * torch.tanh(score / softcap)

        return capped
    one = [n == 1 for n in bias.shape]

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        index = [x * 0 if single else x for x, single in zip((b, h, i, j), one, strict=True)]
        return score + bias[index[0], index[1], index[2], index[3]]

    return biased


def _block_mask(layout: Layout, device: torch.device) -> Any:
    """The layout as flex's block mask, built once and kept with it."""
    if layout.block_mask is not None:
        return layout.block_mask
    if layout.kind == FULL and not layout.causal and layout.window == (None, None):
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    mask_mod, batch = _mask_mod(layout, device)
    with memo.counted():
        made = create_block_mask(
            mask_mod, batch, None, layout.q_len, layout.keys, device=str(device), BLOCK_SIZE=_BLOCK
        )
    if not (layout.kind == FULL and memo.capturing(device)):  # shared with calls outside the graph
        layout.block_mask = made
    return made


def _mask_mod(layout: Layout, device: torch.device) -> tuple[Callable[..., Tensor], int | None]:
    left, right = layout.window
    if layout.causal:
        right = 0 if right is None else min(right, 0)
    shift = layout.keys - layout.q_len

    def band(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j >= 0
        if right is not None:
            seen = seen & (j <= i + shift + right)
        if left is not None:
            seen = seen & (j >= i + shift - left)
        return seen

    if layout.kind == FULL:
        return band, None
    if layout.kind == PADDED:
        assert layout.first is not None and layout.length is not None
        first, end = layout.first, layout.first + layout.length
        return lambda b, h, i, j: band(b, h, i, j) & (j >= first[b]) & (j < end[b]), layout.batch
    assert layout.kind in (DENSE, PACKED)
    mask = layout.dense(device)
    assert mask is not None
    mask = mask.expand(layout.batch, -1, -1, -1)
    return lambda b, h, i, j: mask[b, 0, i, j], layout.batch
