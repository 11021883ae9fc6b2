"""torch's fused kernels on CUDA that know the grouping: cuDNN's and FlashAttention-2's code."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.compat.torch import (
    cudnn_attention,
    cudnn_attention_op,
    flash_attention,
    flash_attention_op,
)

from ._common import rescale_by_sinks
from ._scores import scores_of


def cudnn_plain(
    causal: bool, q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands
) -> tuple[Tensor, None]:
    q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
    return cudnn_attention(q, k, v, None, request.grad, operands.dropout, causal, False, scale=operands.scale)[0], None


def flash_plain(
    causal: bool, q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands
) -> tuple[Tensor, None]:
    q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
    return flash_attention(q, k, v, operands.dropout, causal, False, scale=operands.scale)[0], None


def contiguous_rows(t: Tensor) -> Tensor:
    """The kernels want one element after another in each row."""
    return t if t.stride(-1) == 1 else t.contiguous()


def cudnn_scored(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Tensor:
    """cuDNN with a mask or bias as scores to add; queries that see nothing come out as zeros. No gradients."""
    scores = scores_of(operands.visibility, operands.bias, q.dtype, q.device)
    k, v = scores.clean(k, v)
    q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
    out = cudnn_attention(q, k, v, scores.values, False, operands.dropout, False, False, scale=operands.scale)[0]
    return out if scores.blind is None else out.masked_fill_(scores.blind, 0)


def fused(
    which: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, request: AttentionRequest, operands: Operands
) -> Tensor:
    """``which``: 'cudnn' or 'flash', for calls without scores to add."""
    q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
    if which == "cudnn":
        return cudnn_attention_op(q, k, v, None, request.grad, operands.dropout, causal, False, scale=operands.scale)[0]
    D = q.shape[-1]
    if D % 8:
        q, k, v = (F.pad(t, (0, -D % 8)) for t in (q, k, v))
    out, lse = flash_attention_op(q, k, v, operands.dropout, causal, False, scale=operands.scale)[:2]
    out = out[..., :D]
    return out if operands.sinks is None else rescale_by_sinks(out, lse, operands.sinks)
