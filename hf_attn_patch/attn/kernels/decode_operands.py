"""The operands of a decoding call, and whether they go together."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_attn_patch.attn.devices import Device, generation, interpreted, needs_nvidia, no_bf16, tile_room
from hf_attn_patch.grouping import KVGrouping

from .decode_plan import power_of_two

MAX_QUERIES = 1024
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WORD = 64  # queries that a word of a mask has a bit for
CODES = (torch.int8, torch.float8_e4m3fn)
#: of an operator with the operands below
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? block_table, Tensor? first, Tensor? end, Tensor? mask, "
    "Tensor? bias, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, float scale, bool causal, SymInt? window, "
    "float? softcap, bool return_lse) -> (Tensor, Tensor)"
)


class DecodeOperands(NamedTuple):
    """The operands of a decoding call, tensors first; ``grouped_decode`` explains them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor | None
    first: torch.Tensor | None
    end: torch.Tensor | None
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    return_lse: bool


class Sizes(NamedTuple):
    """The sizes of a call."""

    B: int
    HQ: int
    HKV: int
    Sq: int
    Sk: int
    D: int
    DV: int
    page: int  # keys of a page; 1 where K and V lie whole


def why_not(device: Device, dtype: torch.dtype, D: int, DV: int) -> str | None:
    """Why the kernels do not run on a device with operands of this dtype and these head dimensions, or None.

    >>> why_not(Device("cuda", 90), torch.float16, 128, 128), why_not(Device("cuda", 75), torch.float16, 8, 4)
    (None, 'takes head_dim 8 to 512, not 8/4')
    """
    if not interpreted() and (reason := needs_nvidia(device, 70)):
        return reason
    if dtype not in DTYPES:
        return f"takes fp16, bf16 and fp32, not {str(dtype).removeprefix('torch.')}"
    if reason := no_bf16(device, dtype):
        return reason
    if min(D, DV) < MIN_HEAD_DIM or max(D, DV) > MAX_HEAD_DIM:
        return f"takes head_dim {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, not {D}/{DV}"
    tile = 16 * (power_of_two(D) + power_of_two(DV)) * dtype.itemsize
    if device.device == "cuda" and tile > tile_room(device.capability):
        return f"its tiles of head_dim {D}/{DV} need more shared memory than {generation(device.capability)} has"
    return None


def check(o: DecodeOperands) -> Sizes:
    """The sizes of a call whose arguments go together.

    Raises:
        ValueError: they don't; it says which.
    """
    q, k, v, table = o.q, o.k, o.v, o.block_table
    B, HQ, Sq, D = q.shape
    if table is None:
        _, HKV, Sk, DV = v.shape
        page = 1
        if k.shape != (B, HKV, Sk, D) or v.shape[0] != B:
            raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not go together")
    else:
        _, page, HKV, DV = v.shape
        Sk = page * table.shape[1]
        if k.shape != (v.shape[0], page, HKV, D) or table.shape[0] != B or o.end is None:
            raise ValueError(
                f"q {list(q.shape)}, k_pages {list(k.shape)}, v_pages {list(v.shape)} and block_table "
                f"{list(table.shape)} do not go together"
            )
    if HQ % HKV:
        KVGrouping(HQ, HKV)  # raises, and says which numbers would do
    if not (Sq <= MAX_QUERIES and D <= MAX_HEAD_DIM and DV <= MAX_HEAD_DIM):
        raise ValueError(
            f"{Sq} query tokens and head dimensions {D} and {DV}: grouped_decode takes up to {MAX_QUERIES} "
            f"tokens and dimensions up to {MAX_HEAD_DIM}"
        )
    _check_dtypes(o, (B, HKV, Sk))
    if o.window is not None and (not o.causal or o.window < 1):
        raise ValueError(f"window={o.window} needs causal=True and at least one key")
    others = {"first": o.first, "end": o.end, "sinks": o.sinks}
    for name, t in others.items():
        if t is not None and t.shape != ((HQ if name == "sinks" else B),):
            raise ValueError(f"{name} has the shape {list(t.shape)}, not [{HQ if name == 'sinks' else B}]")
    others |= {"k": k, "v": v, "block_table": table, "mask": o.mask, "bias": o.bias}
    others |= {"k_scale": o.k_scale, "v_scale": o.v_scale}
    if elsewhere := [name for name, t in others.items() if t is not None and t.device != q.device]:
        raise ValueError(f"q is on {q.device}, but {', '.join(elsewhere)} is not: they must share one device")
    if o.mask is not None and o.mask.dtype == torch.int64:
        if o.mask.shape not in ((B, 1, 1, Sk), (1, 1, 1, Sk)) or Sq > WORD:
            raise ValueError(
                f"words of a mask are [{B} or 1, 1, 1, {Sk}] for up to {WORD} queries, not {list(o.mask.shape)} for "
                f"{Sq}"
            )
    elif o.mask is not None and o.mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, not {o.mask.dtype}; additive masks are given as bias")
    return Sizes(B, HQ, HKV, Sq, Sk, D, DV, page)


def _check_dtypes(o: DecodeOperands, scales: tuple[int, int, int]) -> None:
    """K and V in q's dtype, or codes with scales of the shape ``scales``."""
    dtypes = o.q.dtype, o.k.dtype, o.v.dtype
    coded = o.k_scale is not None or o.v_scale is not None
    if o.q.dtype not in DTYPES or (not coded and len(set(dtypes)) > 1):
        raise ValueError(f"q, k and v must share one dtype of fp16, bf16 and fp32, not {', '.join(map(str, dtypes))}")
    if not coded:
        return
    if o.k.dtype not in CODES or o.v.dtype not in CODES or o.block_table is not None:
        raise ValueError(
            f"k_scale and v_scale are for codes of int8 or float8_e4m3fn that lie whole, not for k of {o.k.dtype} and "
            f"v of {o.v.dtype}{'' if o.block_table is None else ' in pages'}"
        )
    for name, t in (("k_scale", o.k_scale), ("v_scale", o.v_scale)):
        if t is None or t.shape != scales or t.dtype not in DTYPES:
            found = "nothing" if t is None else f"{list(t.shape)} of {t.dtype}"
            raise ValueError(f"codes need {name} {list(scales)} of fp16, bf16 or fp32, not {found}")
