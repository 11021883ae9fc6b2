"""The classic claims about attention, measured: standard attention against this package's, and MHA against GQA and MQA.

    python benchmarks/claims.py            # about a minute on one GPU
    python benchmarks/claims.py --tiny     # a smoke test on a CPU

1. Standard attention (softmax(Q K^T) V, as the formula is written) against ``hf_attn_patch.attention`` on series of
   168, 720 and 8,760 points: a week, a month and a year of hours. Time and peak memory, forward and backward.
2. What sharing KV heads saves: the bytes of the KV cache and the time of one decoding step, MHA (12 KV heads), 4:1 GQA
   (3) and MQA (1), at the same lengths.

Results are held against fp32 by the conformance rule before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from torch import Tensor

import hf_attn_patch
from benchmarks import assert_conforms
from benchmarks.measure import DEVICE, environment, headline, limits, median_seconds, peak_bytes, table, write_json

POINTS = {168: "a week", 720: "a month", 8760: "a year"}
HQ, D = 12, 64
SHARING = {12: "MHA", 3: "GQA 4:1", 1: "MQA"}


def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, HQ, Sq, D], k and v [B, HQ, Sk, D]: the formula, with all scores in memory."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def make(B: int, S: int, dtype: torch.dtype, kv_heads: int = HQ, q_len: int | None = None) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(S)
    shapes = ((B, HQ, q_len or S, D), (B, kv_heads, S, D), (B, kv_heads, S, D))
    return [torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype) for shape in shapes]


def grads(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients of its weighted sum."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def check(S: int, dtype: torch.dtype, kv_heads: int = HQ) -> None:
    """A batch of one (a year of scores in fp32 would not fit for more): outputs and gradients."""
    inputs = make(1, S, dtype, kv_heads)
    repeat = HQ // kv_heads

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return standard(q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))

    high = torch.float64 if dtype is torch.float32 else torch.float32
    reference = grads(repeated, [t.to(high) for t in inputs])
    low, found = grads(repeated, inputs), grads(hf_attn_patch.attention, inputs)
    for i, (out, small, ref) in enumerate(zip(found, low, reference, strict=True)):
        assert_conforms(out, small, ref, factor=2 if i == 0 else 3)


def guarded(work: Callable[[], Any], seconds: bool) -> float | None:
    """Time or memory of ``work``, or None if it does not fit."""
    try:
        return median_seconds(work, repeats=15, seconds=4) if seconds else peak_bytes(work)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def attention_rows(B: int, lengths: list[int], dtype: torch.dtype) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for S in lengths:
        check(S, dtype)
        for name, function in (("standard", standard), ("hf_attn_patch", hf_attn_patch.attention)):
            inputs = make(B, S, dtype)
            leaves = [t.requires_grad_() for t in make(B, S, dtype)]
            weights = torch.randn_like(inputs[0])
            forward = partial(torch.no_grad()(function), *inputs)

            def both(function: Any = function, leaves: Any = leaves, weights: Tensor = weights) -> None:
                torch.autograd.grad(function(*leaves), leaves, weights)

            row: dict[str, Any] = {"points": S, "implementation": name}
            for phase, work in (("forward", forward), ("training", both)):
                row[f"{phase}_seconds"], row[f"{phase}_bytes"] = guarded(work, True), guarded(work, False)
            rows.append(row)
    return rows


def sharing_rows(B: int, lengths: list[int], dtype: torch.dtype) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for S in lengths:
        for kv_heads, name in SHARING.items():
            check(S, dtype, kv_heads)
            size = 2 * B * kv_heads * S * D * dtype.itemsize
            # several caches in turn, so that the second-level cache of the GPU does not serve them
            sets = [make(B, S, dtype, kv_heads, q_len=1) for _ in range(max(1, min(16, (256 << 20) // size)))]

            @torch.no_grad()
            def steps(sets: list[list[Tensor]] = sets) -> None:
                for q, k, v in sets:
                    hf_attn_patch.attention(q, k, v)

            seconds = median_seconds(steps, warmup=5, repeats=20, seconds=4) / len(sets)
            rows.append({"points": S, "heads": name, "kv_heads": kv_heads, "kv_bytes": size, "step_seconds": seconds})
    return rows


def milliseconds(value: float | None) -> str:
    return "out of memory" if value is None else f"{value * 1e3:.3f}"


def mebibytes(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f}"


def times(better: float | None, worse: float | None) -> str:
    return f"{worse / better:.1f}" if better and worse else ""


def report(result: dict[str, Any]) -> str:
    lines = []
    standards = {row["points"]: row for row in result["attention"] if row["implementation"] == "standard"}
    for row in result["attention"]:
        base = standards[row["points"]]
        cells = [f"{row['points']:,} ({POINTS.get(row['points'], 'tiny')})", row["implementation"]]
        for phase in ("forward", "training"):
            seconds, size = f"{phase}_seconds", f"{phase}_bytes"
            cells += [milliseconds(row[seconds]), times(row[seconds], base[seconds])]
            cells += [mebibytes(row[size]), times(row[size], base[size])]
        lines.append(cells)
    phases = [
        f"{phase} {what}" for phase in ("forward", "fwd + bwd") for what in ("ms", "x faster", "MiB", "x smaller")
    ]
    first = table(("points", "attention", *phases), lines)
    lines = []
    full = {row["points"]: row for row in result["sharing"] if row["kv_heads"] == HQ}
    for row in result["sharing"]:
        base = full[row["points"]]
        cells = [f"{row['points']:,}", f"{row['heads']} ({row['kv_heads']} KV heads)", mebibytes(row["kv_bytes"])]
        cells += [times(row["kv_bytes"], base["kv_bytes"]), f"{row['step_seconds'] * 1e6:.1f}"]
        lines.append([*cells, times(row["step_seconds"], base["step_seconds"])])
    second = table(("points", "heads", "KV cache MiB", "x smaller", "decoding step us", "x faster"), lines)
    shape = f"B={result['shape']['B']}, {HQ} query heads, D={D}, {result['shape']['dtype']}, one layer"
    return f"{shape}\n\n{first}\n\n{second}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default=",".join(map(str, POINTS)), help="lengths, comma-separated")
    parser.add_argument("--tiny", action="store_true", help="a week only, two series: a smoke test")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; default $OUT, else the working directory")
    args = parser.parse_args(argv)
    lengths = [24, 168] if args.tiny else [int(n) for n in args.points.split(",")]
    B = 2 if args.tiny else 8
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    limit, env = limits(args.tiny), environment()
    print(headline(limit, env), flush=True)
    result = {
        "environment": env,
        "limits": limit,
        "shape": {"B": B, "HQ": HQ, "D": D, "dtype": str(dtype).removeprefix("torch.")},
        "attention": attention_rows(B, lengths, dtype),
        "sharing": sharing_rows(B, lengths, dtype),
    }
    path = write_json(result, args.out, "claims")
    print(f"\n{report(result)}\n\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
