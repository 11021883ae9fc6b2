"""How the GPU benchmarks time things, and the limits that times are held against."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[int], Any]


def events(run: Callable[[], Any], n: int) -> list[float]:
    """Microseconds of the device between ``n`` runs, one right after the other (the host runs ahead)."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    run()  # what the host needs to start the first is not counted
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1000 for a, b in itertools.pairwise(marks)]


def replayed(call: Call, sets: int = 1, least_us: float = 1500.0) -> float:
    """Microseconds of the device for a call: the median of CUDA graph replays.

    Args:
        call: is given the number of the input set to use.
        sets: input sets to rotate through, so that the L2 cache does not hold the next call's input.
        least_us: a graph holds as many rounds as take about this long.
    """
    for i in range(min(2, sets)):
        call(i)
    torch.cuda.synchronize()

    def capture(rounds: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for i in range(sets):
                    call(i)
        return graph

    graph = capture(1)
    rounds = max(1, round(least_us / min(events(graph.replay, 3))))
    if rounds > 1:
        graph = capture(rounds)
    return statistics.median(events(graph.replay, 7)) / (rounds * sets)


def called(call: Call, sets: int = 1, least_us: float = 4000.0) -> float:
    """Microseconds a call by the host's clock, many in a row: what Python, torch, launches and the device take."""
    for i in range(5):
        call(i % sets)

    def wall(n: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(n):
            call(i % sets)
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / n * 1e6

    n = max(5, min(400, round(least_us / wall(5))))
    return statistics.median(wall(n) for _ in range(7))


def timed(call: Call, sets: int = 1, least_us: float = 20000.0) -> float:
    """Microseconds of the device for a call that takes it longer than the host needs to start it: a median."""
    numbers = itertools.cycle(range(sets))

    def run() -> None:
        call(next(numbers))

    once = min(events(run, 3))
    return statistics.median(events(run, max(5, min(100, round(least_us / once)))))


def copy_bandwidth(gib: float = 2.0) -> float:
    """Bytes a microsecond of a device-to-device copy, read plus written. Nothing else may run on the machine."""
    a = torch.empty(int(gib * 2**30) // 2, dtype=torch.bfloat16, device="cuda").normal_()
    b = torch.empty_like(a)
    return 2 * a.numel() * a.element_size() / timed(lambda i: b.copy_(a), least_us=40000.0)


def matmul_rate(n: int = 8192) -> float:
    """Floating-point operations a microsecond of an n x n x n matrix product in bf16."""
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in "ab")
    return 2 * n**3 / timed(lambda i: a @ b, least_us=60000.0)
