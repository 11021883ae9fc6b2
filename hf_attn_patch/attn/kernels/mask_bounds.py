"""A mask in short, on the device: where the keys that it shows begin and end, and a word of bits for each key."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_attn_patch.compat.torch import operators_are_watched
from hf_attn_patch.compat.triton import raw_stream

from .decode_operands import WORD
from .decode_plan import power_of_two
from .launcher import Launch

_KEYS = 256  # keys that one program makes words of


def mask_bounds(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First, and one past the last, key that some query of each batch row may see, found on the device.

    Args:
        mask: [B, H, Sq, Sk] bool or :func:`mask_words`, any strides (0 where it is broadcast).

    Returns:
        Two [B] int32 tensors; equal (and so an empty range) where a row sees nothing.
    """
    found: tuple[torch.Tensor, torch.Tensor]
    found = torch.ops.hf_attn_patch.mask_bounds(mask) if operators_are_watched() else _launch(mask)
    return found


def mask_words(mask: torch.Tensor) -> torch.Tensor:
    """Which queries see a key, in one number: what a kernel reads once a key, and not for each query of each head.

    Args:
        mask: [B, 1, Sq, Sk] bool, Sq up to 64, any strides.

    Returns:
        [B, 1, 1, Sk] int64, whose bit i is set where query i may look; of a batch that is broadcast, broadcast.
    """
    words: torch.Tensor = torch.ops.hf_attn_patch.mask_words(mask) if operators_are_watched() else _words(mask)
    return words


def has_words(mask: torch.Tensor, queries: int) -> bool:
    """Whether queries see different keys by ``mask`` [B or 1, HQ or 1, Sq or 1, Sk or 1], alike for all heads."""
    return (
        mask.dtype == torch.bool
        and 1 < queries <= WORD
        and mask.shape[2] == queries
        and mask.stride(2) != 0
        and (mask.shape[1] == 1 or mask.stride(1) == 0)
    )


def _words(mask: torch.Tensor) -> torch.Tensor:
    B, _, Sq, Sk = mask.shape
    rows = 1 if mask.stride(0) == 0 else B
    words = torch.empty(rows, 1, 1, Sk, dtype=torch.int64, device=mask.device)
    strides = (mask.stride(0), mask.stride(2), mask.stride(3))
    grid = (-(-Sk // _KEYS), rows)
    launch = Launch(mask_words_kernel, grid, (*strides, Sq, Sk), {"KEYS": _KEYS}, {"num_warps": 4})
    with torch.cuda.device_of(mask):
        launch.first(strides, (mask, words), (mask.data_ptr(), words.data_ptr()), raw_stream(mask.device))
    return words.expand(B, -1, -1, -1)


_mask_words = torch.library.custom_op(
    "hf_attn_patch::mask_words",
    lambda mask: _words(mask).contiguous(),
    mutates_args=(),
    schema="(Tensor mask) -> Tensor",
)


@_mask_words.register_fake
def _(mask: torch.Tensor) -> torch.Tensor:
    return mask.new_empty((mask.shape[0], 1, 1, mask.shape[-1]), dtype=torch.int64)


def _launch(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    B, H, Sq, Sk = mask.shape
    strides = mask.stride()
    first = torch.empty(B, dtype=torch.int32, device=mask.device)
    end = torch.empty_like(first)
    sizes = (1 if strides[1] == 0 else H, 1 if strides[2] == 0 else Sq, Sk)
    block = min(8192, max(128, power_of_two(Sk)))
    launch = Launch(mask_bounds_kernel, (B, 1), (*strides, *sizes), {"BLOCK": block}, {"num_warps": 8})
    with torch.cuda.device_of(mask):
        pointers = (mask.data_ptr(), first.data_ptr(), end.data_ptr())
        launch.first(strides, (mask, first, end), pointers, raw_stream(mask.device))
    return first, end


_mask_bounds = torch.library.custom_op(
    "hf_attn_patch::mask_bounds", _launch, mutates_args=(), schema="(Tensor mask) -> (Tensor, Tensor)"
)


@_mask_bounds.register_fake
def _(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first = mask.new_empty(mask.shape[0], dtype=torch.int32)
    return first, torch.empty_like(first)


@triton.jit(do_not_specialize=["Sk", "heads", "queries"])
def mask_bounds_kernel(Mask, First, End, m_b, m_h, m_s, m_k, heads, queries, Sk, BLOCK: tl.constexpr):
    """First and one past the last key that any query of a batch row may see."""
    b = tl.program_id(0)
    keys = tl.arange(0, BLOCK)
    lo = tl.full([BLOCK], 2147483647, tl.int32)
    hi = tl.zeros([BLOCK], tl.int32)
    for row in tl.range(0, heads * queries):
        base = Mask + b.to(tl.int64) * m_b + (row // queries).to(tl.int64) * m_h + (row % queries).to(tl.int64) * m_s
        for start in tl.range(0, Sk, BLOCK):
            n = start + keys
            seen = tl.load(base + n.to(tl.int64) * m_k, mask=n < Sk, other=0) != 0
            lo = tl.where(seen, tl.minimum(lo, n), lo)
            hi = tl.where(seen, tl.maximum(hi, n + 1), hi)
    first = tl.min(lo, 0)
    end = tl.max(hi, 0)
    tl.store(First + b, tl.minimum(first, end))
    tl.store(End + b, end)


@triton.jit(do_not_specialize=["queries", "Sk"])
def mask_words_kernel(Mask, Words, m_b, m_s, m_k, queries, Sk, KEYS: tl.constexpr):
    """For KEYS keys of a batch row: bit i says whether query i may look."""
    b = tl.program_id(1).to(tl.int64)
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    at = Mask + b * m_b + keys.to(tl.int64) * m_k
    words = tl.zeros([KEYS], tl.int64)
    bit = tl.full([KEYS], 1, tl.int64)
    for _ in tl.range(0, queries):
        seen = tl.load(at, mask=keys < Sk, other=0) != 0
        words = words | tl.where(seen, bit, 0)
        bit = bit << 1
        at += m_s
    tl.store(Words + b * Sk + keys, words, mask=keys < Sk)
