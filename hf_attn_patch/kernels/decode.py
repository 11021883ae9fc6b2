"""Attention of a few query tokens over a long KV cache: K and V are read once per KV head, whatever the group size.

The kernels (``decode_kernel.py``) split the keys over the GPU by lengths that they read on the device: nothing here
waits for the GPU. The plain truth is ``decode_reference.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton

from hf_attn_patch.grouping import KVGrouping

from .decode_kernel import LOG2E, combine_kernel, decode_kernel, mask_bounds_kernel

MAX_QUERIES = 16
MAX_HEAD_DIM = 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LOG2E = float(LOG2E.value)


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernels run; what they compute does not depend on it.

    Args:
        block_n: keys a tile.
        warps: warps a worker.
        stages: tiles in flight a worker.
        per_sm: workers that one SM holds at a time.
        waves: workers in all, in units of what the GPU holds at a time.
        least: tiles that a worker takes at least.
        block_m: query rows a tile, None: the least power of two that holds the group, 16 to 64.
        direct: True: one worker a head, False: split by length; None: as the shapes suggest.
        lazy_sum: add up the softmax denominator across a tile's keys only at the end.
        evict: cache hint for K and V.
        pdl: let the merge be set up while the workers run (programmatic dependent launch).
        registers: the most that a thread may use, None: as the compiler likes.
    """

    block_n: int = 64
    warps: int = 4
    stages: int = 3
    per_sm: int = 2
    waves: int = 1
    least: int = 4
    block_m: int | None = None
    direct: bool | None = None
    lazy_sum: bool = True
    evict: str = ""
    pdl: bool = False
    registers: int | None = None


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
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of 1 to 16 query tokens, forward only.

    Args:
        q: [B, HQ, Sq, D], fp16, bf16 or fp32; any strides.
        k, v: [B, HKV, Sk, D] and [B, HKV, Sk, Dv], HQ a multiple of HKV, D and Dv up to 512; any strides
            (views of [B, S, H, D] caches, slices of static buffers), best with the last dimension contiguous.
        scale: factor of ``q @ k.T``.
        causal: query i sees keys up to ``end - Sq + i``, itself included.
        first, end: [B] integers on the device: keys ``first <= j < end`` are valid. None: 0 and Sk.
        mask: bool, broadcastable to [B, HQ, Sq, Sk]: True where a query may look.
        bias: float, broadcastable to [B, HQ, Sq, Sk], added to the scaled (and capped) scores; -inf hides a key.
        window: with ``causal``: a query sees at most this many keys, itself included.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: [HQ] logits that join the denominator of each head's softmax.
        return_lse: also return the log of the denominators.

    Returns:
        [B, HQ, Sq, Dv] in q's dtype (laid out as [B, Sq, HQ, Dv]); with ``return_lse`` also [B, HQ, Sq] in fp32.
        Queries that see no key get zeros (and -inf).

    Raises:
        ValueError: shapes, dtypes or options that do not go together.
        RuntimeError: gradients are wanted.
    """
    _no_gradients(q, k, v, bias, sinks)
    args = (q, k, v, None, first, end, mask, bias, sinks, scale, causal, window, softcap, return_lse)
    if torch.compiler.is_compiling() or type(q) is not torch.Tensor:
        out, lse = torch.ops.hf_attn_patch.grouped_decode(*args)
    else:
        out, lse = launch(*args)
    return (out, lse) if return_lse else out


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
    args = (q, k_pages, v_pages, block_table, first, lengths, mask, bias, sinks)
    options = (scale, causal, window, softcap, return_lse)
    if torch.compiler.is_compiling() or type(q) is not torch.Tensor:
        out, lse = torch.ops.hf_attn_patch.grouped_decode(*args, *options)
    else:
        out, lse = launch(*args, *options)
    return (out, lse) if return_lse else out


def mask_bounds(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First, and one past the last, key that some query of each batch row may see, found on the device.

    Args:
        mask: [B, H, Sq, Sk] bool, any strides (0 where it is broadcast).

    Returns:
        Two [B] int32 tensors; equal (and so an empty range) where a row sees nothing.
    """
    B, H, Sq, Sk = mask.shape
    m_b, m_h, m_s, m_k = mask.stride()
    first = torch.empty(B, dtype=torch.int32, device=mask.device)
    end = torch.empty_like(first)
    heads, queries = 1 if m_h == 0 else H, 1 if m_s == 0 else Sq
    block = min(8192, max(128, triton.next_power_of_2(Sk)))
    mask_bounds_kernel[(B,)](mask, first, end, m_b, m_h, m_s, m_k, heads, queries, Sk, BLOCK=block, num_warps=8)
    return first, end


def _no_gradients(*tensors: torch.Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError("grouped_decode has no backward: call it under torch.no_grad(), or use another backend")


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor | None,
    first: torch.Tensor | None,
    end: torch.Tensor | None,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
    tuning: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the arguments, plan the split and start the kernels."""
    B, HQ, Sq, D = q.shape
    if block_table is None:
        _, HKV, Sk, DV = v.shape
        page = 1
        if k.shape != (B, HKV, Sk, D) or v.shape[0] != B:
            raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not go together")
    else:
        _, page, HKV, DV = v.shape
        Sk = page * block_table.shape[1]
        if k.shape != (v.shape[0], page, HKV, D) or block_table.shape[0] != B or end is None:
            raise ValueError(
                f"q {list(q.shape)}, k_pages {list(k.shape)}, v_pages {list(v.shape)} and block_table "
                f"{list(block_table.shape)} do not go together"
            )
        if block_table.stride(1) != 1:
            block_table = block_table.contiguous()
    if HQ % HKV:
        KVGrouping(HQ, HKV)  # raises, and says which numbers would do
    if not (1 <= Sq <= MAX_QUERIES and D <= MAX_HEAD_DIM and DV <= MAX_HEAD_DIM):
        raise ValueError(
            f"{Sq} query tokens and head dimensions {D} and {DV}: grouped_decode takes 1 to {MAX_QUERIES} "
            f"tokens and dimensions up to {MAX_HEAD_DIM}"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must share one dtype of fp16, bf16 and fp32, not {q.dtype}, {k.dtype}, {v.dtype}")
    if window is not None and (not causal or window < 1):
        raise ValueError(f"window={window} needs causal=True and at least one key")
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))

    m_b = m_h = m_s = m_k = a_b = a_h = a_s = a_k = mask_kind = bias_kind = 0
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, not {mask.dtype}; additive masks are given as bias")
        mask = mask.expand(B, HQ, Sq, Sk)
        if end is None and first is None and not causal:
            first, end = mask_bounds(mask)  # so that the split counts only keys that are seen
        m_b, m_h, m_s, m_k = mask.stride()
        mask_kind = 1 if m_h == 0 and (Sq == 1 or m_s == 0) else 2
    if bias is not None:
        bias = bias.expand(B, HQ, Sq, Sk)
        a_b, a_h, a_s, a_k = bias.stride()
        bias_kind = 1 if a_h == 0 and (Sq == 1 or a_s == 0) else 2

    G = HQ // HKV
    out = torch.empty((B, Sq, HQ, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, HQ, Sq) if return_lse else (0,), dtype=torch.float32, device=q.device)
    tuning = tuning or choose(q.dtype, D, DV, G * Sq)
    varlen = first is not None or end is not None
    span = Sk if window is None else min(Sk, window + Sq - 1)
    tiles = -(-span // tuning.block_n)
    block_m = tuning.block_m or min(64, max(16, triton.next_power_of_2(G * Sq)))
    m_tiles = -(-G * Sq // block_m)
    slots = max(1, _sm_count(q.device) * tuning.per_sm * tuning.waves // m_tiles)
    split, workers, chunk = plan(B * HKV, tiles, slots, tuning, varlen)
    part = torch.empty(workers * 2 * G * Sq * (DV + 1) if split else 0, dtype=torch.float32, device=q.device)

    qk_scale, cap = (scale * _LOG2E, 0.0) if softcap is None else (scale / softcap, softcap * _LOG2E)
    q_b, q_h, q_s, _ = q.stride()
    if block_table is None:
        k_b, k_h, k_s, _ = k.stride()
        v_b, v_h, v_s, _ = v.stride()
        table_stride = 0
    else:
        k_b, k_s, k_h, _ = k.stride()
        v_b, v_s, v_h, _ = v.stride()
        table_stride = block_table.stride(0)
    block_b = max(16, triton.next_power_of_2(B))
    common = {
        "DV": DV,
        "BLOCK_N": tuning.block_n,
        "BLOCK_B": block_b,
        "WINDOW": window is not None,
        "HAS_FIRST": first is not None,
        "HAS_END": end is not None,
        "HAS_SINKS": sinks is not None,
        "HAS_LSE": return_lse,
        "PDL": tuning.pdl and split,
    }
    with _on(q.device):
        decode_kernel[(workers * m_tiles,)](
            q, k, v, out, lse, part, first, end, mask, bias, sinks, block_table,
            q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, m_b, m_h, m_s, m_k, a_b, a_h, a_s, a_k, table_stride,
            B, HKV, G, Sq, Sk, page, window or 0, chunk, workers, qk_scale, cap,
            D=D,
            BLOCK_M=block_m,
            BLOCK_D=max(16, triton.next_power_of_2(D)),
            BLOCK_DV=max(16, triton.next_power_of_2(DV)),
            M_TILES=m_tiles,
            SPLIT=split,
            CAUSAL=causal and Sq > 1,
            SOFTCAP=softcap is not None,
            MASK=mask_kind,
            BIAS=bias_kind,
            PAGED=block_table is not None,
            LAZY_SUM=tuning.lazy_sum,
            EVICT=tuning.evict,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            **common,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            maxnreg=tuning.registers,
        )  # fmt: skip
        if split:
            block_p, block_dv = merge_shape(-(-workers // (B * HKV)) + 1, DV)
            combine_kernel[(B * HQ * Sq, -(-DV // block_dv))](
                out, lse, part, first, end, sinks, B, HKV, G, Sq, Sk, window or 0, chunk, workers,
                BLOCK_P=block_p,
                BLOCK_DV=block_dv,
                **common,
                num_warps=4,
                launch_pdl=tuning.pdl,
            )  # fmt: skip
    return out.transpose(1, 2), lse


def choose(dtype: torch.dtype, D: int, DV: int, rows: int) -> Tuning:
    """The tuning for a kind of input."""
    key_bytes = (triton.next_power_of_2(D) + triton.next_power_of_2(DV)) * dtype.itemsize
    block_n = max(16, min(128, triton.next_power_of_2(32768 // key_bytes)))
    return Tuning(block_n=block_n)


def plan(heads: int, tiles: int, slots: int, tuning: Tuning, varlen: bool) -> tuple[bool, int, int]:
    """Whether to split, into how many workers, and the tiles of each (at least, where lengths vary).

    Args:
        heads: KV heads of all batch rows.
        tiles: the most tiles that a head can have.
        slots: workers that run at a time.
    """
    if tuning.direct or (tuning.direct is None and tiles <= 2 * tuning.least):
        return False, heads, 0
    total = heads * tiles
    workers = max(1, min(slots, -(-total // tuning.least)))
    if varlen:
        return True, workers, tuning.least
    chunk = max(tuning.least, -(-total // workers))
    if chunk < tiles:  # a cut that follows the heads spares a worker its second head, where it costs next to nothing
        even = -(-tiles // -(-tiles // chunk))
        rounds = -(-(heads * (tiles // even)) // slots)
        if tiles % even == 0 and rounds * even <= chunk * 1.03:
            chunk = even
    if chunk % tiles == 0 and tuning.direct is None:
        return False, heads, 0
    return True, -(-total // chunk), chunk


def merge_shape(parts: int, DV: int) -> tuple[int, int]:
    """Parts and columns that one step of the merge takes."""
    block_p = 4 if parts <= 4 else 16 if parts <= 16 else 64  # few sizes: a growing cache seldom compiles
    return block_p, max(16, min(triton.next_power_of_2(DV), 2048 // block_p))


@cache
def _sm_count(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: few enough that small tests split, and share workers between heads
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class _Here:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_HERE = _Here()


def _on(device: torch.device) -> torch.cuda.device | _Here:
    """Triton starts kernels on the current device; a model spread over several GPUs does not switch it."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@torch.library.custom_op(
    "hf_attn_patch::grouped_decode",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? block_table, Tensor? first, Tensor? end, Tensor? mask, "
    "Tensor? bias, Tensor? sinks, float scale, bool causal, SymInt? window, float? softcap, bool return_lse) "
    "-> (Tensor, Tensor)",
)
def _grouped_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor | None,
    first: torch.Tensor | None,
    end: torch.Tensor | None,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch(q, k, v, block_table, first, end, mask, bias, sinks, scale, causal, window, softcap, return_lse)


@_grouped_decode.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: object, return_lse: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    B, HQ, Sq, _ = q.shape
    with_lse = rest[-1] if return_lse is None else return_lse
    out = q.new_empty((B, Sq, HQ, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty((B, HQ, Sq) if with_lse else (0,), dtype=torch.float32)
