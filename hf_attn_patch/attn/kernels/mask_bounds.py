"""Where the keys that a mask shows begin and end, found on the device."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_attn_patch.compat.torch import operators_are_watched
from hf_attn_patch.compat.triton import raw_stream

from .decode_plan import power_of_two
from .launcher import Launch


def mask_bounds(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First, and one past the last, key that some query of each batch row may see, found on the device.

    Args:
        mask: [B, H, Sq, Sk] bool, any strides (0 where it is broadcast).

    Returns:
        Two [B] int32 tensors; equal (and so an empty range) where a row sees nothing.
    """
    found: tuple[torch.Tensor, torch.Tensor]
    found = torch.ops.hf_attn_patch.mask_bounds(mask) if operators_are_watched() else _launch(mask)
    return found


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
