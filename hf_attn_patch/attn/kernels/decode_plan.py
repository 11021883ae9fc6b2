"""How the decode kernels run: tile shapes, and how many workers share the keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from hf_attn_patch.attn.devices import shared_memory


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
        pdl: set up each of the two kernels while the one before it runs (programmatic dependent launch).
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
    pdl: bool = True
    registers: int | None = None


def choose(
    dtype: torch.dtype,
    D: int,
    DV: int,
    heads: int,
    span: int,
    sms: int,
    varlen: bool,
    room: int = 1 << 17,
    rows: int = 1,
) -> Tuning:
    """The tuning for a kind of input, by what an H200 showed (``benchmarks/tune_decode.py``).

    Keys that do not fill the GPU are cut finer: with little to read, what counts is how long one worker takes.

    Where a worker stays in one head, one wide worker an SM is best: it has the most bytes in flight. That is so where
    heads fill the SMs evenly (then a head is not split at all), or are so few that one is shared by eight SMs or
    more; and it takes long heads, and few queries (of 64 it takes twice the time: ``recorded_step.md``).
    Else two workers an SM: while one changes heads, the other reads.

    Codes of one byte are read in tiles of as many bytes, always by two workers an SM: while one converts, the other
    reads (measured on an H100: ``benchmarks/results/kv_codes.md``).

    Args:
        dtype: of K and V.
        heads: KV heads of all batch rows.
        span: the most keys that a head can have.
        varlen: heads differ in length.
        room: the largest tile of K and V in bytes, see :func:`hf_attn_patch.attn.devices.tile_room`.
        rows: queries that share a KV head.
    """
    key_bytes = (power_of_two(D) + power_of_two(DV)) * dtype.itemsize
    block_n = max(16, min(128, power_of_two(32768 // key_bytes)))
    codes = dtype.itemsize == 1
    held = key_bytes + 2 * power_of_two(DV) * codes  # values are kept as fp16 too
    while block_n > 16 and block_n * held > room:
        block_n //= 2
    if codes:
        if heads * span > 4 * sms * block_n:
            return Tuning(block_n=block_n)
        return Tuning(block_n=max(16, min(64, block_n)), least=2)
    even = not varlen and heads >= 0.95 * sms * -(-heads // sms)
    wide = 2 * block_n
    few = rows <= 32 and (even or 8 * heads <= sms)
    if few and heads * span >= 6 * wide * sms and wide * key_bytes <= min(room, 65536):
        return Tuning(block_n=wide, warps=8, per_sm=1, direct=even or None)
    if heads * span > 4 * sms * block_n:
        return Tuning(block_n=block_n, direct=even or None)
    if heads * span <= sms * block_n and span >= 8 * block_n > 128:
        block_n //= 2
    return Tuning(block_n=block_n, direct=even or None, least=2)


def block_rows(rows: int, q_size: int, dtype: torch.dtype, D: int, DV: int, block_n: int, capability: int) -> int:
    """Query rows a tile: the least power of two that holds the group, 16 to 64, and no more than fit into a block's
    shared memory beside the keys; further ones are tiles of their own, which read the keys again.

    Bytes as compiled by Triton 3.7. From Ampere on: queries, two tiles in flight, weights; of codes values as fp16 too.
    Before, where there is one tile, each operand twice.

    Args:
        q_size: bytes of a number of the queries.
        dtype: of K and V.

    >>> block_rows(64, 2, torch.float16, 256, 256, 32, 90), block_rows(64, 2, torch.float16, 256, 256, 32, 89)
    (64, 32)
    """
    width, out = power_of_two(D), power_of_two(DV)
    keys = block_n * (2 * (width + out) * dtype.itemsize + 2 * out * (dtype.itemsize == 1))
    block = min(64, max(16, power_of_two(rows)))

    def fits(block: int) -> bool:
        if capability < 80:
            return (block + block_n) * (width + out) * q_size <= shared_memory(capability)
        return keys + block * (width + block_n) * q_size + 512 <= shared_memory(capability)

    while block > 16 and not fits(block):
        block //= 2
    return block


def plan(heads: int, tiles: int, slots: int, tuning: Tuning, varlen: bool) -> tuple[bool, int]:
    """Whether to split, and into how many workers, which share the tiles evenly.

    Args:
        heads: KV heads of all batch rows.
        tiles: the most tiles that a head can have.
        slots: workers that run at a time.
    """
    if tuning.direct or (tuning.direct is None and tiles <= 2 * tuning.least):
        return False, heads
    total = heads * tiles
    workers = max(1, min(slots, -(-total // tuning.least)))
    if varlen:
        return True, workers
    most = -(-total // workers)
    if most < tiles:  # a cut that follows the heads spares a worker its second head, where it costs next to nothing
        even = -(-tiles // -(-tiles // most))
        rounds = -(-(heads * (tiles // even)) // slots)
        if even >= tuning.least and tiles % even == 0 and rounds * even <= most * 1.03:
            workers = total // even
    if tuning.direct is None and most % tiles == 0:
        return False, heads
    return True, workers


def merge_shape(parts: int, DV: int) -> tuple[int, int]:
    """Parts and columns that one step of the merge takes."""
    block_p = 4 if parts <= 4 else 16 if parts <= 16 else 64  # few sizes: a growing cache seldom compiles
    return block_p, max(16, min(power_of_two(DV), 2048 // block_p))


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n`` (Triton's own is slow)."""
    return 1 << max(0, n - 1).bit_length()


@cache
def overlaps(device: torch.device) -> bool:
    """Whether one kernel may be set up while another still runs there (programmatic dependent launch: Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def sm_count(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: few enough that small tests split, and share workers between heads
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
