"""The Triton kernel that makes codes of new keys and values, both in one launch; its plain truth: ``attn/codes.py``."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_attn_patch.compat.torch import operators_are_watched
from hf_attn_patch.compat.triton import raw_stream

from .decode_plan import power_of_two
from .launcher import Launch

_launches: dict[Any, Launch] = {}
_MOST_LAUNCHES = 1024
_ROWS = 4  # heads of tokens a program


def packed(
    keys: torch.Tensor, values: torch.Tensor, key_dtype: torch.dtype, value_dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Keys [B, HKV, S, D] and values [B, HKV, S, Dv], any strides, as (bits int8 of the same shape, scales fp32
    [B, HKV, S, 1]) each, contiguous.

    Args:
        key_dtype, value_dtype: of the codes: int8 or float8_e4m3fn.
    """
    if operators_are_watched():  # a kernel that is no operator would not be seen
        kb, ks, vb, vs = torch.ops.hf_attn_patch.pack_codes(keys, values, key_dtype, value_dtype)
        return (kb, ks), (vb, vs)
    return _packed(keys, values, key_dtype, value_dtype)


@torch.library.custom_op(
    "hf_attn_patch::pack_codes",
    mutates_args=(),
    schema="(Tensor keys, Tensor values, ScalarType key_dtype, ScalarType value_dtype) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
def _pack_codes(
    keys: torch.Tensor, values: torch.Tensor, key_dtype: torch.dtype, value_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (kb, ks), (vb, vs) = _packed(keys, values, key_dtype, value_dtype)
    return kb, ks, vb, vs


def _packed(
    keys: torch.Tensor, values: torch.Tensor, key_dtype: torch.dtype, value_dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    B, H, S, D = keys.shape
    DV = values.shape[-1]
    bits = [torch.empty(t.shape, dtype=torch.int8, device=t.device) for t in (keys, values)]
    scales = [torch.empty((B, H, S, 1), dtype=torch.float32, device=keys.device) for _ in "kv"]
    tensors = (keys, values, *bits, *scales)
    rows = B * H * S
    if rows:
        pointers = [t.data_ptr() for t in tensors]
        strides = (*keys.stride()[:3], *values.stride()[:3])
        kinds = key_dtype, value_dtype, keys.dtype, values.dtype
        key = (keys.shape, DV, strides, kinds, keys.device, tuple(p % 16 for p in pointers))
        launch, stream = _launches.get(key), raw_stream(keys.device)
        with torch.cuda.device_of(keys):
            if launch is not None:
                launch(stream, tensors, pointers)
            else:
                constants = {
                    "D": D, "DV": DV, "BLOCK_D": power_of_two(max(D, DV)), "ROWS": _ROWS,
                    "K_FP8": key_dtype != torch.int8, "V_FP8": value_dtype != torch.int8,
                }  # fmt: skip
                scalars = (*strides, H, S, rows)
                launch = Launch(pack_kernel, (-(-rows // _ROWS), 2), scalars, constants, {"num_warps": 1})
                launch.first(strides, tensors, pointers, stream)
                if len(_launches) >= _MOST_LAUNCHES:
                    _launches.clear()
                _launches[key] = launch
    return (bits[0], scales[0]), (bits[1], scales[1])


@triton.jit(do_not_specialize=["H", "S", "rows"])
def pack_kernel(
    K, V, KBits, VBits, KScales, VScales, k_b, k_h, k_s, v_b, v_h, v_s, H, S, rows,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, K_FP8: tl.constexpr,
    V_FP8: tl.constexpr,
):  # fmt: skip
    """ROWS rows (a head of a token each) of keys, where the grid's second number is 0, or of values."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    if tl.program_id(1) == 0:
        _pack_rows(K, KBits, KScales, k_b, k_h, k_s, row, row_ok, H, S, D, BLOCK_D, K_FP8)
    else:
        _pack_rows(V, VBits, VScales, v_b, v_h, v_s, row, row_ok, H, S, DV, BLOCK_D, V_FP8)


@triton.jit
def _pack_rows(
    X, Bits, Scales, x_b, x_h, x_s, row, row_ok, H, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    b, h, s = (row // S // H).to(tl.int64), row // S % H, row % S
    columns = tl.arange(0, BLOCK_D)
    ok = row_ok[:, None] & (columns < D)[None, :]
    start = b * x_b + h.to(tl.int64) * x_h + s.to(tl.int64) * x_s
    x = tl.load(X + start[:, None] + columns[None, :], mask=ok, other=0.0).to(tl.float32)
    largest = 448.0 if FP8 else 127.0
    scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.zeros([row.shape[0]], tl.float32) + largest)
    y = tl.div_rn(x, tl.where(scale == 0, 1.0, scale)[:, None] + tl.zeros_like(x))
    y = tl.minimum(tl.maximum(y, -largest), largest)
    if FP8:
        bits = y.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    else:
        bits = ((y + 12582912.0) - 12582912.0).to(tl.int8)  # to the nearest, of two the even one
    tl.store(Bits + (row.to(tl.int64) * D)[:, None] + columns[None, :], bits, mask=ok)
    tl.store(Scales + row, scale, mask=row_ok)
