"""What the benchmarks share: medians, the machine's limits, peak memory, tables, JSON with date and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_timing import copy_bandwidth, matmul_rate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = ("torch", "transformers", "triton", "flash-attn-4", "flash-attn", "hf-attn-patch")


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median_seconds(
    work: Callable[[], Any],
    *,
    warmup: int = 2,
    repeats: int = 7,
    seconds: float = 3.0,
    setup: Callable[[], Any] | None = None,
) -> float:
    """The median wall time of ``work()``, device included; at least 3 of them once ``seconds`` are spent."""
    times: list[float] = []
    begin = time.perf_counter()
    for i in range(warmup + repeats):
        if setup is not None:
            setup()
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        if i >= warmup:
            times.append(time.perf_counter() - start)
        if len(times) >= 3 and time.perf_counter() - begin > seconds:
            break
    return statistics.median(times)


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """How far memory rises above what is allocated now while ``work()`` runs; None without a GPU."""
    if DEVICE != "cuda":
        work()
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def limits(tiny: bool = False) -> dict[str, float]:
    """What this machine can do at best, now: bf16 matmul in FLOP/s, device copy in bytes read and written a second."""
    if DEVICE == "cuda" and not tiny:
        return {"matmul_flops": matmul_rate() * 1e6, "copy_bytes": copy_bandwidth() * 1e6}
    n, size = 256, 1 << 20
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in "ab")
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    matmul = median_seconds(lambda: torch.mm(a, b), warmup=5, repeats=20)
    copy = median_seconds(lambda: target.copy_(source), warmup=5, repeats=20)
    return {"matmul_flops": 2 * n**3 / matmul, "copy_bytes": 2 * size / copy}


def environment() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are aligned on the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    number = [any(row[i][:1].isdigit() for row in rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = zip(cells, widths, number, strict=True)
        return "| " + " | ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in padded) + " |"

    rule = (
        "|" + "|".join("-" * (w + 1) + (":" if right else "-") for w, right in zip(widths, number, strict=True)) + "|"
    )
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def write_json(result: dict[str, Any], out: Path | None, name: str) -> Path:
    """To ``out``: a .json path, or a folder; by default $OUT, or the working directory."""
    path = Path(os.environ.get("OUT", ".")) if out is None else out
    if path.suffix != ".json":
        path = path / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def headline(limit: dict[str, float], env: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return (
        f"{env['date']}, {env['device']}, {versions}\n"
        f"limits in this run: matmul {limit['matmul_flops'] / 1e12:.3g} TFLOP/s, "
        f"copy {limit['copy_bytes'] / 1e12:.3g} TB/s (read + written)"
    )
