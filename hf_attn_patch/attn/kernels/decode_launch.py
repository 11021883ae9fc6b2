"""From the arguments of a decoding call to the kernels that run: checked and planned once for a kind of call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from hf_attn_patch.attn.devices import device_of, tile_room
from hf_attn_patch.compat.triton import raw_stream

from .combine_kernel import combine_kernel
from .decode_codes import FP8, INT8
from .decode_kernel import decode_kernel
from .decode_line import LOG2E
from .decode_operands import DecodeOperands, Sizes, check
from .decode_plan import Tuning, block_rows, choose, merge_shape, overlaps, plan, power_of_two, sm_count
from .launcher import Launch
from .mask_bounds import has_words, mask_bounds, mask_words

SHORT = 1024  # keys: for no more, finding where a mask begins and ends costs more than it saves
_LOG2E = float(LOG2E.value)


TENSORS = 11  # so many of the operands are tensors
#: those whose last dimension the kernels read without a stride; masks and biases have one
_WITH_ROWS = ("q", "k", "v", "block_table", "first", "end", "sinks", "k_scale", "v_scale")


@dataclass(slots=True)
class LaunchPlan:
    """All that is worked out once for calls of the same shapes, strides, dtypes, devices and options."""

    shape: tuple[int, ...]  # of the output, [B, HQ, Sq, Dv]
    strides: tuple[int, ...]
    part: int  # floats of partial results
    lse: bool
    dtype: torch.dtype
    device: torch.device
    decode: Launch
    combine: Launch | None
    fp8: bool  # codes that the kernel is handed as their bits


_launches: dict[Any, LaunchPlan] = {}
_MOST_LAUNCHES = 4096  # a growing cache makes a new kind at each token


def launch(
    o: DecodeOperands, tuning: Tuning | None = None, wide: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check the operands, plan the split and start the kernels; for a kind of call that is known, only the last.

    Args:
        wide: the output in fp32, for results that are merged with others.
    """
    mask = o.mask
    if mask is not None and mask.shape[-1] > SHORT:
        if has_words(mask, o.q.shape[2]):
            mask = mask_words(mask)
            o = o._replace(mask=mask)
        if o.end is None and o.first is None and not o.causal:  # so that the split counts only keys that are seen
            first, end = mask_bounds(mask.expand(*o.q.shape[:3], -1))
            o = o._replace(first=first, end=end)
    tensors: Any = o[:TENSORS]
    present = [t for t in tensors if t is not None]
    kinds = [(t.shape, t.stride(), t.dtype, t.get_device()) for t in present]
    pointers: list[int | None] = [t.data_ptr() for t in present]
    low = 0
    for p in pointers:
        low |= p or 0
    which: Any = None  # of the operands are there
    if len(present) > 3:
        which = tuple([t is None for t in tensors])
        rest = iter(pointers)
        pointers = [None if missing else next(rest) for missing in which]
    else:
        pointers += [None] * (TENSORS - 3)
    aligned = low % 16 == 0 or tuple([p is None or p % 16 == 0 for p in pointers])
    key = (*kinds, which, aligned, o[TENSORS:], tuning, wide)
    known = _launches.get(key)
    if known is not None:
        return _start(known, tensors, pointers)

    rows: dict[str, Any] = {name: _contiguous_rows(getattr(o, name)) for name in _WITH_ROWS}
    ready = o._replace(**rows)
    if any(new is not old for new, old in zip(ready, o, strict=True)):
        return launch(ready, tuning, wide)
    planned, strides = _plan(o, tuning)
    if wide:
        planned.dtype = torch.float32
    if 0 in planned.shape:
        return _outputs(planned)
    result = _start(planned, tensors, pointers, strides)
    if len(_launches) >= _MOST_LAUNCHES:
        _launches.clear()
    _launches[key] = planned  # only now: of a launch that failed nothing is remembered
    return result


def _start(
    planned: LaunchPlan,
    tensors: tuple[torch.Tensor | None, ...],
    pointers: list[int | None],
    strides: tuple[int, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Start the kernels of ``planned``; for the first time where the strides are given."""
    device = planned.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # kernels start on the current device; a model on several GPUs does not switch
            return _start(planned, tensors, pointers, strides)
    out, lse = _outputs(planned)
    part = torch.empty(planned.part, dtype=torch.float32, device=device) if planned.part else None
    q, k, v, table, first, end, mask, bias, sinks, k_scale, v_scale = tensors
    p_q, p_k, p_v, p_table, p_first, p_end, p_mask, p_bias, p_sinks, p_k_scale, p_v_scale = pointers
    if planned.fp8:
        k, v = k.view(torch.int8), v.view(torch.int8)  # type: ignore[union-attr]
    p_out, p_lse, p_part = (
        out.data_ptr(),
        None if lse is None else lse.data_ptr(),
        None if part is None else part.data_ptr(),
    )
    ts = (q, k, v, k_scale, v_scale, out, lse, part, first, end, mask, bias, sinks, table)
    ps = (p_q, p_k, p_v, p_k_scale, p_v_scale, p_out, p_lse, p_part, p_first, p_end, p_mask, p_bias, p_sinks, p_table)
    merged_ts, merged_ps = (out, lse, part, first, end, sinks), (p_out, p_lse, p_part, p_first, p_end, p_sinks)
    stream = raw_stream(device)
    if strides is None:
        planned.decode(stream, ts, ps)
    else:
        planned.decode.first(strides, ts, ps, stream)
    if planned.combine is not None:
        if strides is None:
            planned.combine(stream, merged_ts, merged_ps)
        else:
            planned.combine.first((), merged_ts, merged_ps, stream)
    return out, lse


def _outputs(planned: LaunchPlan) -> tuple[torch.Tensor, torch.Tensor | None]:
    out = torch.empty_strided(planned.shape, planned.strides, dtype=planned.dtype, device=planned.device)
    return out, torch.empty(planned.shape[:3], dtype=torch.float32, device=planned.device) if planned.lse else None


def _contiguous_rows(t: torch.Tensor | None) -> torch.Tensor | None:
    if t is None or t.dim() == 0 or t.stride(-1) == 1 or t.shape[-1] == 1:
        return t
    return t.contiguous()


def _scores_like(t: torch.Tensor | None, n: Sizes) -> tuple[int, tuple[int, ...]]:
    """How a mask or a bias is read, as the kernel calls it, and its strides."""
    if t is None:
        return 0, (0, 0, 0, 0)
    strides = t.expand(n.B, n.HQ, n.Sq, n.Sk).stride()
    if t.dtype == torch.int64:
        return 3, strides
    return (1 if (n.HQ == n.HKV or strides[1] == 0) and (n.Sq == 1 or strides[2] == 0) else 2), strides


def _strides(o: DecodeOperands, *scores: tuple[int, ...]) -> tuple[int, ...]:
    """All strides in the order of the decode kernel's arguments."""
    table = o.block_table
    if table is None:
        kv = (*o.k.stride()[:3], *o.v.stride()[:3])
    else:
        (k_b, k_s, k_h, _), (v_b, v_s, v_h, _) = o.k.stride(), o.v.stride()
        kv = (k_b, k_h, k_s, v_b, v_h, v_s)
    codes = [s for t in (o.k_scale, o.v_scale) for s in ((0, 0) if t is None else t.stride()[:2])]
    return (*o.q.stride()[:3], *kv, *codes, *scores[0], *scores[1], 0 if table is None else table.stride(0))


def _plan(o: DecodeOperands, tuning: Tuning | None) -> tuple[LaunchPlan, tuple[int, ...]]:
    """What to start for such arguments, and the strides, which the decode kernel is specialised on."""
    n = check(o)
    B, HQ, HKV, Sq, Sk, D, DV, page = n
    mask_kind, mask_strides = _scores_like(o.mask, n)
    bias_kind, bias_strides = _scores_like(o.bias, n)
    strides = _strides(o, mask_strides, bias_strides)

    G, window = HQ // HKV, o.window or 0
    varlen = o.first is not None or o.end is not None
    span = Sk if o.window is None else min(Sk, window + Sq - 1)
    sms = sm_count(o.q.device)
    capability, dtype = device_of(o.q.device).capability or 90, o.k.dtype
    tuning = tuning or choose(dtype, D, DV, B * HKV, span, sms, varlen, tile_room(capability), G * Sq)
    block_m = tuning.block_m or block_rows(G * Sq, o.q.itemsize, dtype, D, DV, tuning.block_n, capability)
    m_tiles = max(1, -(-G * Sq // block_m))
    slots = max(1, sms * tuning.per_sm * tuning.waves // m_tiles)
    split, workers = plan(B * HKV, -(-span // tuning.block_n), slots, tuning, varlen)

    common = _common(o, n, tuning)
    qk_scale, cap = (o.scale * _LOG2E, 0.0) if o.softcap is None else (o.scale / o.softcap, o.softcap * _LOG2E)
    decode = Launch(
        decode_kernel,
        (workers * m_tiles, 1),
        (*strides, B, HKV, G, Sq, Sk, page, window, tuning.least, workers, qk_scale, cap),
        {
            "D": D,
            "BLOCK_M": block_m,
            "BLOCK_D": max(16, power_of_two(D)),
            "BLOCK_DV": max(16, power_of_two(DV)),
            "M_TILES": m_tiles,
            "SPLIT": split,
            "CAUSAL": o.causal and Sq > 1,
            "SOFTCAP": o.softcap is not None,
            "MASK": mask_kind,
            "BIAS": bias_kind,
            "PAGED": _paged(o, page, tuning),
            **_codes(o, n),
            "LAZY_SUM": tuning.lazy_sum,
            "EVICT": tuning.evict,
            "PRECISION": "ieee" if o.q.dtype == torch.float32 else "tf32",
            **common,
        },
        {
            "num_warps": tuning.warps,
            "num_stages": tuning.stages,
            "maxnreg": tuning.registers,
            "launch_pdl": common["PDL"],
        },
    )
    combine = _combine(n, window, tuning, workers, common) if split else None
    part = workers * 2 * G * Sq * (DV + 1) if split else 0
    out_strides = (Sq * HQ * DV, DV, HQ * DV, 1)  # [B, Sq, HQ, Dv] in memory
    shape, fp8 = (B, HQ, Sq, DV), torch.float8_e4m3fn in (o.k.dtype, o.v.dtype)
    return LaunchPlan(shape, out_strides, part, o.return_lse, o.q.dtype, o.q.device, decode, combine, fp8), strides


def _codes(o: DecodeOperands, n: Sizes) -> dict[str, Any]:
    """The constants that say how codes are read."""
    if o.k_scale is None:
        return {"CODES": 0, "V_CODES": 0, "DOTS": None, "FAST": False, "WORDS": False}
    fp8 = [t.dtype == torch.float8_e4m3fn for t in (o.k, o.v)]
    exact = o.q.dtype == torch.float32
    device = device_of(o.q.device)
    return {
        "CODES": FP8.value if fp8[0] else INT8.value,
        "V_CODES": FP8.value if fp8[1] else INT8.value,
        "DOTS": tl.float32 if exact else tl.float16,
        "FAST": device.device == "cuda" and not exact and (not any(fp8) or device.capability >= 89),
        "WORDS": n.DV % 4 == 0 and o.v.data_ptr() % 16 == 0 and not any(s % 4 for s in o.v.stride()[:3]),
    }


def _paged(o: DecodeOperands, page: int, tuning: Tuning) -> int:
    """0: K and V lie whole; 1: in pages; 2: in pages of which each holds whole tiles."""
    if o.block_table is None:
        return 0
    return 2 if page % tuning.block_n == 0 and o.first is None and o.window is None else 1


def _common(o: DecodeOperands, n: Sizes, tuning: Tuning) -> dict[str, Any]:
    """The constants that both kernels are compiled with."""
    return {
        "DV": n.DV,
        "BLOCK_N": tuning.block_n,
        "BLOCK_B": max(16, power_of_two(n.B)),
        "WINDOW": o.window is not None,
        "HAS_FIRST": o.first is not None,
        "HAS_END": o.end is not None,
        "HAS_SINKS": o.sinks is not None,
        "HAS_LSE": o.return_lse,
        "PDL": tuning.pdl and overlaps(o.q.device),
    }


def _combine(n: Sizes, window: int, tuning: Tuning, workers: int, common: dict[str, Any]) -> Launch:
    """What merges the partial results of ``workers``."""
    B, HQ, HKV, Sq, Sk, _, DV, _ = n
    block_p, block_dv = merge_shape(-(-workers // max(1, B * HKV)) + 1, DV)
    return Launch(
        combine_kernel,
        (B * HQ * Sq, -(-DV // block_dv)),
        (B, HKV, HQ // HKV, Sq, Sk, window, tuning.least, workers),
        {"BLOCK_P": block_p, "BLOCK_DV": block_dv, **common},
        {"num_warps": 4, "launch_pdl": common["PDL"]},
    )
