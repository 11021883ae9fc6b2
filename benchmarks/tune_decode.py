"""Find the best Tuning of the grouped decode kernel on this GPU: one table, JSON to $OUT.

    python benchmarks/tune_decode.py [--rows 0,4] [--seconds 150]

Every result is held to the conformance rule, written over NaN and repeated bit by bit before it is timed. Times are
CUDA graph replays over rotating inputs (L2 is cold); speeds are bytes of valid K and V over time, as a share of a
device copy (read + written) in the same run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import assert_conforms
from benchmarks.gpu_timing import called, copy_bandwidth, replayed
from hf_attn_patch.attn.kernels import decode, decode_launch
from hf_attn_patch.attn.kernels.decode_plan import Tuning, choose
from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_reference

#: B, keys, HQ, HKV, D
ROWS = [
    (1, 8192, 32, 32, 128),
    (1, 8192, 32, 8, 128),
    (1, 131072, 32, 8, 128),
    (16, 8192, 32, 32, 128),
    (16, 8192, 32, 8, 128),
    (16, 8192, 32, 1, 128),
    (64, 8192, 32, 8, 128),
    (8, 8760, 12, 3, 64),
]
PADS = ("plain", "left", "right")
NAN = float("nan")


class Case:
    """One row of the table: rotating inputs of one shape and padding."""

    def __init__(self, row: tuple[int, ...], pad: str, empty: bool = False) -> None:
        self.B, self.S, self.HQ, self.HKV, self.D = row
        self.row, self.pad = row, pad
        generator = torch.Generator("cuda").manual_seed(7)
        lengths = torch.randint(self.S // 8, self.S + 1, (self.B,), generator=generator, device="cuda").int()
        self.first: torch.Tensor | None = None
        self.end: torch.Tensor | None = None
        self.bytes = 2 * 2 * self.D * self.HKV * self.B * self.S
        sets = 1 if empty else max(1, min(16, -(-(512 << 20) // self.bytes)))
        make = torch.empty if empty else torch.randn
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        self.q = make(self.B, self.HQ, 1, self.D, **options)
        self.kv = [tuple(make(self.B, self.HKV, self.S, self.D, **options) for _ in "kv") for _ in range(sets)]
        self.valid: torch.Tensor | None = None
        if pad != "plain":
            none, full = torch.zeros_like(lengths), torch.full_like(lengths, self.S)
            self.first, self.end = (full - lengths, full) if pad == "left" else (none, lengths)
            self.bytes = 2 * 2 * self.D * self.HKV * int(lengths.sum())
            keys = torch.arange(self.S, device="cuda")
            self.valid = (keys >= self.first[:, None]) & (keys < self.end[:, None])
            for t in (t for pair in self.kv for t in pair if not empty):
                t.masked_fill_(~self.valid[:, None, :, None], NAN)

    def ours(self, tuning: Tuning | None, i: int = 0) -> torch.Tensor:
        k, v = self.kv[i]
        options = (*[None] * 5, self.D**-0.5, True, None, None, False)
        return decode.launch(decode.DecodeOperands(self.q, k, v, None, self.first, self.end, *options), tuning)[0]

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The plain function in bf16 and in fp32, of the first inputs."""
        out = []
        for dtype in (torch.bfloat16, torch.float32):
            rows = []
            for b in range(self.B):
                ends: dict[str, Any] = {"first": self.first, "end": self.end}
                ends = {name: None if t is None else t[b : b + 1] for name, t in ends.items()}
                q, k, v = (t[b : b + 1].to(dtype) for t in (self.q, *self.kv[0]))
                rows.append(grouped_decode_reference(q, k, v, scale=self.D**-0.5, **ends)[0])
            out.append(torch.cat(rows))
        return out[0], out[1]

    def check(self, tuning: Tuning | None, low: torch.Tensor, ref: torch.Tensor) -> None:
        poison = torch.full((self.B, 1, self.HQ, self.D), NAN, dtype=torch.bfloat16, device="cuda")
        del poison  # the allocator hands this block to the output
        out = self.ours(tuning)
        assert_conforms(out, low, ref)
        for _ in range(3):
            assert torch.equal(out, self.ours(tuning)), "not repeatable"


def peers(case: Case) -> dict[str, float | str]:
    """Times of torch's kernels, and of FA4 where it is installed."""
    mask = None if case.valid is None else case.valid[:, None, None, :]

    def sdpa(backend: SDPBackend) -> Callable[[int], Any]:
        def call(i: int) -> torch.Tensor:
            k, v = case.kv[i]
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    case.q, k, v, attn_mask=mask, enable_gqa=case.HQ != case.HKV
                )

        return call

    calls = {"cudnn": sdpa(SDPBackend.CUDNN_ATTENTION)}
    if case.pad == "plain":
        calls["flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
        try:
            from flash_attn.cute import flash_attn_func

            q = case.q.transpose(1, 2)
            calls["fa4"] = lambda i: flash_attn_func(q, *(t.transpose(1, 2) for t in case.kv[i]))
        except ImportError:
            pass
    found: dict[str, float | str] = {}
    for name, call in calls.items():
        try:
            found[name] = replayed(call, len(case.kv))
        except Exception as error:  # a peer that cannot run this row is said so, and left out
            found[name] = f"{type(error).__name__}: {str(error)[:80]}"
    return found


def shapes(D: int) -> list[dict[str, Any]]:
    """Tile shapes to try."""
    n = 64 if D == 128 else 128
    return [
        {"block_n": n, "stages": 3, "per_sm": 2},
        {"block_n": n, "stages": 3, "per_sm": 2, "pdl": True},
        {"block_n": 2 * n, "stages": 3, "per_sm": 1, "warps": 8},
        {"block_n": n, "stages": 4, "per_sm": 2},
        {"block_n": n, "stages": 5, "per_sm": 1},
        {"block_n": n, "stages": 3, "per_sm": 3, "registers": 168},
        {"block_n": n // 2, "stages": 4, "per_sm": 3, "registers": 168},
        {"block_n": n // 2, "stages": 5, "per_sm": 2},
        {"block_n": 2 * n, "stages": 3, "per_sm": 1, "warps": 8, "direct": True},
        {"block_n": n, "stages": 4, "per_sm": 2, "direct": True},
        {"block_n": n, "stages": 6, "per_sm": 1, "direct": True},
    ]


def around(best: Tuning) -> list[list[Tuning]]:
    """What to try around the best so far, one group after the other."""
    return [
        [replace(best, waves=2), replace(best, direct=not best.direct), replace(best, stages=best.stages + 1)],
        [replace(best, least=2), replace(best, least=8)],
        [replace(best, pdl=not best.pdl)],
        [replace(best, evict="evict_first")],
    ]


def compile_share(jobs: list[tuple[tuple[int, ...], str, Tuning]]) -> None:
    """In a process of its own: put these variants into Triton's cache on disk."""
    for row, pad, tuning in jobs:
        try:
            Case(row, pad, empty=True).ours(tuning)
            torch.cuda.synchronize()
        except Exception as error:  # told again, and skipped, where it would be timed
            print("compile", row, tuning, type(error).__name__, str(error)[:120], flush=True)
            if "CUDA error" in str(error):
                return


def precompile(rows: Sequence[tuple[int, ...]], seconds: float) -> None:
    kinds: dict[Any, tuple[tuple[int, ...], str, Tuning]] = {}
    for row in rows:
        for pad in ("plain", "right"):
            for shape in shapes(row[4]):
                if not shape.get("direct") or pad == "plain":
                    tuning = Tuning(**{"direct": False, **shape})
                    kind = (row[2] // row[3] <= 16, row[0] > 16, row[4], pad, str(tuning))
                    kinds.setdefault(kind, (row, pad, tuning))
    jobs = list(kinds.values())
    n = min(12, max(1, (os.cpu_count() or 2) - 2))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_share, args=(jobs[i::n],)) for i in range(n)]
    begin = time.time()
    for w in workers:
        w.start()
    for w in workers:
        w.join(max(1.0, seconds - (time.time() - begin)))
        if w.is_alive():
            w.terminate()
    print(f"compiled {len(jobs)} variants in {time.time() - begin:.0f} s", flush=True)


def tune(case: Case, deadline: float) -> tuple[Tuning, float, list[dict[str, Any]]]:
    """The best tuning, the default's time, and all that was measured."""
    low, ref = case.truth()
    seen: dict[Tuning, float] = {}
    log: list[dict[str, Any]] = []

    def measure(tuning: Tuning) -> None:
        if tuning in seen:
            return
        try:
            case.check(tuning, low, ref)
            seen[tuning] = replayed(lambda i: case.ours(tuning, i), len(case.kv))
            log.append({"tuning": asdict(tuning), "us": seen[tuning]})
        except Exception as error:  # reported, and never the best
            if "CUDA error" in str(error):
                raise
            seen[tuning] = float("inf")
            log.append({"tuning": asdict(tuning), "error": f"{type(error).__name__}: {str(error)[:300]}"})
            print("  variant failed:", tuning, type(error).__name__, str(error)[:200], flush=True)

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    default = choose(torch.bfloat16, case.D, case.D, case.B * case.HKV, case.S, sms, varlen=case.pad != "plain")
    measure(default)
    for shape in shapes(case.D):
        if time.time() < deadline:
            measure(Tuning(**shape))
    for group in range(len(around(default))):
        for tuning in around(min(seen, key=lambda t: seen[t]))[group]:
            if time.time() < deadline:
                measure(tuning)
    return min(seen, key=lambda t: seen[t]), seen[default], log


def eager_latency() -> None:
    """Wall microseconds a call without graphs: what Python, torch and the launches cost."""
    for B, S, HQ, HKV, D in ((1, 128, 32, 8, 128), (1, 512, 32, 8, 128), (1, 2048, 32, 8, 128), (8, 512, 12, 12, 64)):
        q = torch.randn(B, HQ, 1, D, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.randn(B, HKV, S, D, dtype=torch.bfloat16, device="cuda") for _ in "kv")
        first, end = torch.zeros(B, dtype=torch.int32, device="cuda"), torch.full((B,), S, device="cuda").int()
        lengths = [(k[:, :, :n], v[:, :, :n]) for n in range(S // 2, S)]
        calls = {
            "ours": lambda i: decode.grouped_decode(q, k, v, scale=0.1),  # noqa: B023
            "ours, first/end": lambda i: decode.grouped_decode(q, k, v, scale=0.1, first=first, end=end),  # noqa: B023
            "ours, a new length each": lambda i: decode.grouped_decode(q, *lengths[i], scale=0.1),  # noqa: B023
            "torch sdpa": lambda i: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),  # noqa: B023
        }
        texts = []
        for name, call in calls.items():
            decode_launch._launches.clear()
            sets = len(lengths) if "length" in name else 1
            texts.append(f"{name} {called(call, sets):.1f} (graph {replayed(call, sets):.1f})")
        print(f"eager us a call, B {B} S {S} {HQ}/{HKV}:", ", ".join(texts), flush=True)


def short(tuning: Tuning) -> str:
    parts = [f"n{tuning.block_n} w{tuning.warps} s{tuning.stages} x{tuning.per_sm}"]
    default = Tuning()
    for name in ("block_m", "waves", "least", "direct", "lazy_sum", "evict", "pdl", "registers"):
        if getattr(tuning, name) != getattr(default, name):
            parts.append(f"{name}={getattr(tuning, name)}")
    return " ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", help="numbers of the rows to run, 0 to 7")
    parser.add_argument("--pads", default=",".join(PADS))
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--precompile", type=float, default=60.0, help="seconds at most for compiling side by side")
    options = parser.parse_args()
    begin = time.time()
    rows = [ROWS[int(i)] for i in options.rows.split(",")] if options.rows else ROWS
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    precompile(rows, options.precompile)
    eager_latency()
    limit = copy_bandwidth()
    print(f"copy {limit / 1e6:.3f} TB/s", flush=True)
    cases = [(row, pad) for row in rows for pad in options.pads.split(",")]
    results, lines = [], []
    for number, (row, pad) in enumerate(cases):
        left = options.seconds - (time.time() - begin)
        deadline = time.time() + left / (len(cases) - number)
        case = Case(row, pad)
        try:
            others = peers(case)
            best, default_us, log = tune(case, deadline)
        except Exception as error:
            print("row failed:", row, pad, type(error).__name__, str(error)[:300], flush=True)
            if "CUDA error" in str(error):
                break
            continue
        timed = [e["us"] for e in log if "us" in e]
        if not timed:
            lines.append(f"{row!s:26} {pad:6} nothing ran")
            continue
        us = min(timed)
        texts = " ".join(f"{n} {t:.1f}" if isinstance(t, float) else f"{n} -" for n, t in others.items())
        lines.append(
            f"{row!s:26} {pad:6} {case.bytes / 1e6:6.0f} MB {us:7.1f} us {case.bytes / us / limit:5.2f} of copy "
            f"(default {default_us:.1f}) | {texts} | {short(best)}"
        )
        print(lines[-1], flush=True)
        results.append(
            {"row": row, "pad": pad, "bytes": case.bytes, "us": us, "default_us": default_us,
             "best": asdict(best), "peers": others, "variants": log}
        )  # fmt: skip
        del case
        torch.cuda.empty_cache()
    print(f"\n{time.time() - begin:.0f} s; our best variant, its share of the copy bandwidth, the default, peers (us)")
    print("\n".join(lines))
    if os.environ.get("OUT"):
        versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_per_us": limit}
        Path(os.environ["OUT"], "tune_decode.json").write_text(json.dumps({**versions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
