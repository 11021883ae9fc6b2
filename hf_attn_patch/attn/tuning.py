"""What the backends take on this machine, and where one becomes faster than another, by measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from . import crossovers as numbers
from .crossovers import Crossovers
from .devices import half_of
from .dispatch import attend
from .ladder import order
from .plan import forget, reasons
from .request import request_for
from .visibility import full

#: seconds of one call of a backend: (backend, B, HQ, HKV, Sq, Sk, D) -> float
Measure = Callable[[str, int, int, int, int, int, int], float]
#: B, HQ, HKV, Sq, Sk, D
SHAPES = ((1, 32, 8, 1, 4096, 128), (16, 32, 8, 1, 8192, 128), (1, 32, 8, 512, 512, 128), (4, 32, 8, 2048, 2048, 128))
TINY = ((1, 4, 2, 1, 64, 32), (1, 4, 2, 32, 32, 32))


def seconds(backend: str, B: int, HQ: int, HKV: int, Sq: int, Sk: int, D: int) -> float:
    """Seconds a call, host and device, as a model that waits for neither sees them: the median of several rounds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = half_of(torch.device(device)) if device == "cuda" else torch.float32
    q = torch.randn(B, HQ, Sq, D, device=device, dtype=dtype)
    k, v = (torch.randn(B, HKV, Sk, D, device=device, dtype=dtype) for _ in "kv")
    seen = full(Sq, Sk, True, (None, None), B)

    def rounds(n: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(n):
            attend(q, k, v, visibility=seen, name=backend)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / n

    with torch.no_grad():
        rounds(3)
        n = max(3, min(200, int(0.01 / rounds(3))))
        return statistics.median(rounds(n) for _ in range(5))


def tuned(measure: Measure, rival: str = "flash4") -> Crossovers:
    """The crossovers between our and torch's kernels and FlashAttention-4, by measurement.

    Args:
        rival: "torch_sdpa" on a GPU without FlashAttention-4: when many queries become its work, and not ours.
    """
    small = numbers.SHIPPED.small_work_bits if rival != "flash4" else _small_work(measure)

    def ours_is_faster(B: int, Sq: int) -> bool:
        shape = (B, 32, 8, Sq, 4096, 128)
        return measure("triton_decode", *shape) <= measure(rival, *shape)

    rows = 0
    for Sq in (2, 4, 8, 12, 16):  # of 4 query heads each, over enough KV heads to fill any GPU
        if not ours_is_faster(32, Sq):
            break
        rows = 4 * Sq
    streams = 2**31  # never
    for B in (32, 16, 8, 4, 2, 1):
        if ours_is_faster(B, 16):
            break
        streams = 8 * B
    return Crossovers(small, rows, streams)


def _small_work(measure: Measure) -> int:
    small = 0
    try:
        with numbers.using(Crossovers(small_work_bits=62)):  # torch's kernel for small work, however much it is
            forget()
            for exponent in range(7, 13):
                S = 2**exponent
                shape = (1, 32, 8, S, S, 128)
                if measure("torch_sdpa", *shape) > measure("flash4", *shape):
                    break
                small = (32 * S * S * 128).bit_length()
    finally:
        forget()
    return small


def times(shapes: tuple[tuple[int, int, int, int, int, int], ...]) -> list[dict[str, Any]]:
    """Every backend's time for a few shapes, in the ladder's order."""
    lines = []
    for B, HQ, HKV, Sq, Sk, D in shapes:
        request = request_for(B, HQ, HKV, Sq, Sk, D)
        refused = dict(reasons(request))
        for name in order(request):
            line: dict[str, Any] = {"shape": [B, HQ, HKV, Sq, Sk, D], "backend": name, "reason": refused[name]}
            if refused[name] is None:
                line["us"] = seconds(name, B, HQ, HKV, Sq, Sk, D) * 1e6
            lines.append(line)
    return lines
