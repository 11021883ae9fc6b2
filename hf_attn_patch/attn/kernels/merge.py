"""The Triton kernel that puts a shared part's result and a row's other result together (``attn/shared.py``)."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_attn_patch.compat.torch import operators_are_watched
from hf_attn_patch.compat.triton import raw_stream

from .decode_line import LN2, LOG2E
from .decode_plan import power_of_two
from .launcher import Launch

_launches: dict[Any, Launch] = {}
_MOST_LAUNCHES = 4096


def merge(
    part: tuple[torch.Tensor, torch.Tensor],
    slot: torch.Tensor | None,
    most: int,
    other: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over two sets of keys from the results over each.

    Args:
        part: (out [R, HQ, N * Sq, Dv] fp32, laid out as [R, N * Sq, HQ, Dv]; lse [R, HQ, N * Sq] fp32, contiguous).
        slot: int32 [B], where each row of the batch is among the R * N; None: in their order.
        most: N.
        other: (out [B, HQ, Sq, Dv] fp32, laid out as [B, Sq, HQ, Dv]; lse [B, HQ, Sq] fp32, contiguous).

    Returns:
        (out [B, HQ, Sq, Dv] in ``dtype``, laid out as [B, Sq, HQ, Dv]; lse [B, HQ, Sq] in fp32, if asked for).
    """
    if operators_are_watched():
        out, lse = torch.ops.hf_attn_patch.merge_parts(*part, slot, most, *other, dtype, with_lse)
        return out, lse if with_lse else None
    return _launch(*part, slot, most, *other, dtype, with_lse)


def _launch(
    a: torch.Tensor,
    a_lse: torch.Tensor,
    slot: torch.Tensor | None,
    most: int,
    b: torch.Tensor,
    b_lse: torch.Tensor,
    dtype: torch.dtype,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    B, HQ, Sq, DV = b.shape
    out = torch.empty((B, Sq, HQ, DV), dtype=dtype, device=b.device).transpose(1, 2)
    lse = torch.empty((B, HQ, Sq), dtype=torch.float32, device=b.device) if with_lse else None
    tensors = (a, a_lse, b, b_lse, slot, out, lse)
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    key = (B, HQ, Sq, DV, most, dtype, b.device, slot is None, with_lse, tuple(p and p % 16 for p in pointers))
    launch, stream = _launches.get(key), raw_stream(b.device)
    with torch.cuda.device_of(b):
        if launch is not None:
            launch(stream, tensors, pointers)
            return out, lse
        heads = min(8, power_of_two(HQ))
        launch = Launch(
            merge_kernel,
            (B * Sq, -(-HQ // heads)),
            (HQ, Sq, most),
            {
                "DV": DV,
                "BLOCK_H": heads,
                "BLOCK_DV": max(16, power_of_two(DV)),
                "HAS_SLOT": slot is not None,
                "HAS_LSE": with_lse,
            },
            {"num_warps": 4},
        )
        launch.first((), tensors, pointers, stream)
    if len(_launches) >= _MOST_LAUNCHES:
        _launches.clear()
    _launches[key] = launch
    return out, lse


@torch.library.custom_op(
    "hf_attn_patch::merge_parts",
    mutates_args=(),
    schema="(Tensor part, Tensor part_lse, Tensor? slot, SymInt most, Tensor other, Tensor other_lse, "
    "ScalarType dtype, bool with_lse) -> (Tensor, Tensor)",
)
def _merge_parts(*operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _launch(*operands)
    return out, out.new_empty(0, dtype=torch.float32) if lse is None else lse


@_merge_parts.register_fake
def _(
    part: torch.Tensor,
    part_lse: torch.Tensor,
    slot: torch.Tensor | None,
    most: int,
    other: torch.Tensor,
    other_lse: torch.Tensor,
    dtype: torch.dtype,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, HQ, Sq, DV = other.shape
    out = other.new_empty((B, Sq, HQ, DV), dtype=dtype).transpose(1, 2)
    return out, other.new_empty((B, HQ, Sq) if with_lse else (0,), dtype=torch.float32)


@triton.jit(do_not_specialize=["HQ", "Sq", "most"])
def merge_kernel(
    A, ALse, B, BLse, Slot, Out, Lse, HQ, Sq, most,
    DV: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_SLOT: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """One query of BLOCK_H heads; a query that saw nothing in one part, or in both, has -inf there."""
    b = tl.program_id(0) // Sq
    i = tl.program_id(0) % Sq
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    ok = heads < HQ
    offs = tl.arange(0, BLOCK_DV)
    slot = b
    if HAS_SLOT:
        slot = tl.load(Slot + b)
    a_at = ((slot // most).to(tl.int64) * HQ + heads) * (most * Sq) + (slot % most) * Sq + i
    b_at = (b.to(tl.int64) * HQ + heads) * Sq + i
    a_lse = tl.load(ALse + a_at, mask=ok, other=float("-inf"))
    b_lse = tl.load(BLse + b_at, mask=ok, other=float("-inf"))
    top = tl.maximum(a_lse, b_lse)
    use = tl.where(top == float("-inf"), 0.0, top)
    a_weight = tl.exp2((a_lse - use) * LOG2E)
    b_weight = tl.exp2((b_lse - use) * LOG2E)
    total = a_weight + b_weight
    some = total > 0
    a_weight /= tl.where(some, total, 1.0)
    b_weight /= tl.where(some, total, 1.0)
    a_rows = (slot.to(tl.int64) * Sq + i) * HQ + heads
    rows = (b.to(tl.int64) * Sq + i) * HQ + heads
    inside = ok[:, None] & (offs < DV)[None, :]
    a = tl.load(A + (a_rows * DV)[:, None] + offs[None, :], mask=inside, other=0.0)
    x = tl.load(B + (rows * DV)[:, None] + offs[None, :], mask=inside, other=0.0)
    x = a * a_weight[:, None] + x * b_weight[:, None]
    tl.store(Out + (rows * DV)[:, None] + offs[None, :], x.to(Out.dtype.element_ty), mask=inside)
    if HAS_LSE:
        tl.store(Lse + b_at, tl.where(some, use + tl.log2(tl.where(some, total, 1.0)) * LN2, float("-inf")), mask=ok)
