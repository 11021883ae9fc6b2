"""Attention of a few query tokens over a long KV cache: K and V are read once per KV head, whatever the group size.

The kernels (``decode_kernel.py``) split the keys over the GPU by lengths that they read on the device: nothing here
waits for the GPU. The plain truth is ``decode_reference.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_attn_patch.compat.torch import operators_are_watched

from .decode_launch import SHORT, launch
from .decode_operands import DTYPES, MAX_HEAD_DIM, MAX_QUERIES, SCHEMA, DecodeOperands
from .mask_bounds import has_words, mask_bounds, mask_words

__all__ = [
    "DTYPES",
    "MAX_HEAD_DIM",
    "MAX_QUERIES",
    "SHORT",
    "DecodeOperands",
    "grouped_decode",
    "grouped_decode_paged",
    "has_words",
    "launch",
    "mask_bounds",
    "mask_words",
]


def grouped_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    first: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of a few query tokens (up to 1,024; fast for up to 64 rows of a group), forward only.

    Args:
        q: [B, HQ, Sq, D], fp16, bf16 or fp32; any strides.
        k, v: [B, HKV, Sk, D] and [B, HKV, Sk, Dv], HQ a multiple of HKV, D and Dv up to 512; any strides
            (views of [B, S, H, D] caches, slices of static buffers), best with the last dimension contiguous.
        scale: factor of ``q @ k.T``.
        causal: query i sees keys up to ``end - Sq + i``, itself included: the last query of a row is aligned with
            the row's last valid key, wherever the padding is. Right-padded queries that sit beside their own keys
            (token i at key i) are not that: give ``causal=False`` and a ``mask``.
        first, end: [B] integers on the device: keys ``first <= j < end`` are valid. None: 0 and Sk.
        mask: bool, broadcastable to [B, HQ, Sq, Sk]: True where a query may look; or :func:`mask_words` of one.
        bias: float, broadcastable to [B, HQ, Sq, Sk], added to the scaled (and capped) scores; -inf hides a key.
        window: with ``causal``: a query sees at most this many keys, itself included.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: [HQ] logits that join the denominator of each head's softmax.
        k_scale, v_scale: [B, HKV, Sk], fp16, bf16 or fp32: k and v are codes, int8 or float8_e4m3fn, and stand for
            ``k * k_scale[..., None]`` and ``v * v_scale[..., None]``, which are never written out.
        return_lse: also return the log of the denominators.

    Returns:
        [B, HQ, Sq, Dv] in q's dtype (laid out as [B, Sq, HQ, Dv]); with ``return_lse`` also [B, HQ, Sq] in fp32.
        Queries that see no key get zeros (and -inf).

    Raises:
        ValueError: shapes, dtypes or options that do not go together.
        RuntimeError: gradients are wanted.
    """
    _no_gradients(q, k, v, bias, sinks)
    options = (scale, causal, window, softcap, return_lse)
    return _run(DecodeOperands(q, k, v, None, first, end, mask, bias, sinks, k_scale, v_scale, *options))


def grouped_decode_paged(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    first: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`grouped_decode` where K and V lie in pages.

    Args:
        q: [B, HQ, Sq, D].
        k_pages, v_pages: [pages, page, HKV, D] and [pages, page, HKV, Dv].
        block_table: [B, max_pages] int32: page ``j // page`` of a row holds its key j. Entries past a row's
            length are not read.
        lengths: [B] int32: valid keys of each row.

    The rest, the result and the errors are those of :func:`grouped_decode`; masks have Sk = max_pages * page.
    """
    _no_gradients(q, k_pages, v_pages, bias, sinks)
    options = (scale, causal, window, softcap, return_lse)
    tensors = (q, k_pages, v_pages, block_table, first, lengths, mask, bias, sinks, None, None)
    return _run(DecodeOperands(*tensors, *options))


def _run(o: DecodeOperands) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Through the operator where somebody writes operators down, or what only looks like a tensor has no memory."""
    if torch.compiler.is_compiling() or type(o.q) is not torch.Tensor or operators_are_watched():
        out, lse = torch.ops.hf_attn_patch.grouped_decode(*o)
    else:
        out, lse = launch(o)
    return (out, lse) if o.return_lse else out


def _no_gradients(*tensors: torch.Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError("grouped_decode has no backward: call it under torch.no_grad(), or use another backend")


@torch.library.custom_op("hf_attn_patch::grouped_decode", mutates_args=(), schema=SCHEMA)
def _grouped_decode(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    o = DecodeOperands(*operands)
    out, lse = launch(o)
    return out, o.q.new_empty(0, dtype=torch.float32) if lse is None else lse


@_grouped_decode.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object, return_lse: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    B, HQ, Sq, _ = q.shape
    with_lse = rest[-1] if return_lse is None else return_lse
    out = q.new_empty((B, Sq, HQ, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty((B, HQ, Sq) if with_lse else (0,), dtype=torch.float32)
