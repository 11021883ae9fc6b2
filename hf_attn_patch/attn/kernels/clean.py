"""The Triton kernel that puts zeros where nobody looks, in keys and values in one launch; its plain truth:
``attn/backends/_unseen.py``."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_attn_patch.compat.triton import raw_stream

from .decode_plan import power_of_two
from .launcher import Launch

#: what is said of a key: zeros in any case; zeros for what is not finite
DEAD, LOW = tl.constexpr(1), tl.constexpr(2)
_ROWS = 16


def cleaned(k: Tensor, v: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
    """K [B, HKV, Sk, D] and V [B, HKV, Sk, Dv] with zeros where ``flags`` says so, laid out as they are.

    Args:
        flags: uint8 [B or 1, HKV or 1, Sk or 1], DEAD or LOW or 0 of each key.
    """
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    out = torch.empty_like(k), torch.empty_like(v)
    if out[0].stride(-1) != 1 or out[1].stride(-1) != 1:  # of slices that lie oddly
        return cleaned(k.contiguous(), v.contiguous(), flags)
    B, H, S, D = k.shape
    of_flags = [0 if n == 1 else s for n, s in zip(flags.shape, flags.stride(), strict=True)]
    strides = [s for t in (k, v, *out) for s in t.stride()[:3]] + of_flags
    widest = power_of_two(max(D, v.shape[-1]))
    constants = {"D": D, "DV": v.shape[-1], "BLOCK_D": widest, "ROWS": _ROWS}
    launch = Launch(clean_kernel, (-(-B * H * S // _ROWS), 2), (*strides, H, S, B * H * S), constants, {"num_warps": 4})
    tensors = (k, v, flags, *out)
    with torch.cuda.device_of(k):
        launch.first(strides, tensors, [t.data_ptr() for t in tensors], raw_stream(k.device))
    return out


@triton.jit(do_not_specialize=["f_b", "f_h", "f_s", "H", "S", "rows"])
def clean_kernel(
    K, V, Flags, KOut, VOut, k_b, k_h, k_s, v_b, v_h, v_s, ko_b, ko_h, ko_s, vo_b, vo_h, vo_s, f_b, f_h, f_s,
    H, S, rows, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows (a head of a token each) of keys, where the grid's second number is 0, or of values."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, h, s = (row // S // H).to(tl.int64), (row // S % H).to(tl.int64), (row % S).to(tl.int64)
    ok = row < rows
    flags = tl.load(Flags + b * f_b + h * f_h + s * f_s, mask=ok, other=0)
    if tl.program_id(1) == 0:
        _clean(K + b * k_b + h * k_h + s * k_s, KOut + b * ko_b + h * ko_h + s * ko_s, flags, ok, D, BLOCK_D)
    else:
        _clean(V + b * v_b + h * v_h + s * v_s, VOut + b * vo_b + h * vo_h + s * vo_s, flags, ok, DV, BLOCK_D)


@triton.jit
def _clean(x_at, to, flags, ok, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    inside = ok[:, None] & (columns < D)[None, :]
    x = tl.load(x_at[:, None] + columns[None, :], mask=inside, other=0.0)
    finite = tl.abs(x.to(tl.float32)) < float("inf")  # false for NaN
    zero = (flags == DEAD)[:, None] | ((flags == LOW)[:, None] & ~finite)
    tl.store(to[:, None] + columns[None, :], tl.where(zero, 0.0, x).to(x.dtype), mask=inside)
