"""Attention kernels side by side: ours (``hf_attn_patch.attention``) and its peers, row by row.

    python benchmarks/kernels.py                                  # every section, about two minutes on an H200
    python benchmarks/kernels.py --sections decode,paged --flex   # flex_attention compiles for every row: slow
    python benchmarks/kernels.py --tiny                           # a smoke test on the CPU

Every contender is held to the conformance rule (tests/helpers/conformance.py) against fp32 before its speed is
printed; then they take turns. Times are medians: of the device, back to back, for prefill and training; of CUDA graph
replays over rotating inputs (the L2 cache is cold) for decoding, where "eager" is the host's clock around calls
without a graph. Rates count the pairs that are visible (x 3.5 with the backward), or the bytes of the keys and values
that are. "of limit" is the share of a bf16 matrix product or of a device copy in the same run; "ratio" our rate over
the best peer's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch

from benchmarks import assert_conforms
from benchmarks.gpu_timing import called, replayed, timed
from benchmarks.kernel_peers import Call, UnsupportedError, contenders
from benchmarks.kernel_rows import Inputs, Row, rows
from benchmarks.measure import DEVICE, environment, headline, limits, median_seconds, table, write_json

TURNS = 3
PAUSE = 0.15  # seconds
SECTIONS = ("decode", "prefill", "training", "options", "paged", "packed", "codes")
#: what is timed: from the number of an input set to the output, or to a list of it and the gradients
Work = Callable[[int], Any]
#: by contender
Results = dict[str, dict[str, Any]]


def with_gradients(call: Call, x: Inputs) -> Work:
    """Forward and backward: the output, then the gradients of q, k, v and what is added."""
    wanted = () if x.bias is None else (x.bias,)

    def both(i: int) -> list[torch.Tensor]:
        out = call(i)
        return [out, *torch.autograd.grad(out, (x.q, *x.kv[i], *wanted), x.grad)]

    return both


def check(work: Work, x: Inputs, low: list[torch.Tensor], ref: list[torch.Tensor]) -> None:
    """Output and gradients of the first input set against the truth.

    Raises:
        AssertionError: they do not conform.
    """
    results = work(0) if x.row.backward else [work(0)]
    for i, result in enumerate(zip(x.part(*results), low, ref, strict=True)):
        assert_conforms(*result, factor=3.0 if i else 2.0)


def speeds(work: Work, x: Inputs) -> dict[str, Any]:
    """Microseconds: ``us`` (of the device), and ``eager_us`` where the host may take longer."""
    if DEVICE != "cuda":
        return {"us": median_seconds(lambda: work(0), warmup=1, repeats=2) * 1e6}
    sets = len(x.kv)
    if not x.row.decode:
        return {"us": timed(work)}
    eager = called(work, sets)
    try:
        return {"us": replayed(work, sets), "eager_us": eager}
    except Exception as error:
        if lost_device(error):
            raise
        return {"us": eager, "eager_us": eager, "note": f"no CUDA graph: {_first_line(error)}"}


def in_turns(works: dict[str, Work], x: Inputs) -> Results:
    """Medians over several turns, each begun by another contender, with pauses: after matrix products at full power (of
    the truth, of another contender) the GPU's clock is lower for a while."""
    names = list(works)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: Results = {}
    for turn in range(TURNS if DEVICE == "cuda" else 1):
        for name in names[turn:] + names[:turn]:
            if name in failed:
                continue
            if not x.row.decode:
                time.sleep(PAUSE)
            try:
                found[name].append(speeds(works[name], x))
            except Exception as error:
                failed[name] = failure(error)
    return failed | {name: _medians(turns) for name, turns in found.items() if name not in failed}


def _medians(turns: list[dict[str, Any]]) -> dict[str, Any]:
    first = turns[0]
    return {k: v if isinstance(v, str) else statistics.median(t[k] for t in turns) for k, v in first.items()}


def lost_device(error: Exception) -> bool:
    """Whether nothing runs on this GPU any more."""
    return "illegal" in str(error) or "unspecified launch failure" in str(error)


def failure(error: Exception) -> dict[str, Any]:
    """What is said of a contender that has no time: a peer that fails is part of the result."""
    if isinstance(error, UnsupportedError):
        return {"unsupported": str(error)}
    if isinstance(error, AssertionError):
        return {"wrong": _first_line(error)}
    if lost_device(error):
        raise error
    return {"failed": f"{type(error).__name__}: {_first_line(error)}"}


def measure(row: Row, makers: dict[str, Callable[[Inputs], Call]]) -> dict[str, Any]:
    """One row: every contender's times, or why it has none."""
    x = Inputs(row)
    works: dict[str, Work] = {}
    results: Results = {name: {} for name in makers}
    with torch.set_grad_enabled(row.backward):
        low = x.truth(x.dtype)
        ref = x.truth(torch.float32 if DEVICE == "cuda" else torch.float64)
        for name, make in makers.items():
            try:
                work = with_gradients(make(x), x) if row.backward else make(x)
                check(work, x, low, ref)
                works[name] = work
            except Exception as error:
                results[name] = failure(error)
        del low, ref
        results |= in_turns(works, x)
    unit, amount = x.work()
    out = {**asdict(row), "name": row.name, "unit": unit, "work": amount, "results": results}
    peers = {name: r["us"] for name, r in results.items() if name != "ours" and "us" in r}
    if peers:
        out["best_peer"] = min(peers, key=lambda name: peers[name])
        if "us" in results["ours"]:
            out["ratio"] = peers[out["best_peer"]] / results["ours"]["us"]
    return out


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else "")[:160]


def report(measured: list[dict[str, Any]], limit: dict[str, float]) -> str:
    """A table a section, and what failed."""
    texts, notes = [], []
    for section in dict.fromkeys(r["section"] for r in measured):
        mine = [r for r in measured if r["section"] == section]
        names = [n for n in mine[0]["results"] if n != "ours" and any("us" in r["results"][n] for r in mine)]
        eager = any("eager_us" in r["results"]["ours"] for r in mine)
        header = [section, "ours us", *(f"{n} us" for n in names), "rate", "of limit", "best peer", "ratio"]
        lines = []
        for r in mine:
            cells = [r["name"]]
            for name in ("ours", *names):
                us = r["results"][name].get("us")
                cells.append("-" if us is None else f"{us:.1f}")
            us = r["results"]["ours"].get("us")
            rate, unit = (None if us is None else r["work"] / us * 1e6), r["unit"]
            top = limit["copy_bytes" if unit == "byte" else "matmul_flops"]
            cells.append("-" if rate is None else f"{rate / 1e12:.3g} T{'B' if unit == 'byte' else 'FLOP'}/s")
            cells.append("-" if rate is None else f"{rate / top:.2f}")
            cells += [r.get("best_peer", "-"), f"{r['ratio']:.2f}" if "ratio" in r else "-"]
            if eager:
                best = r["results"].get(r.get("best_peer", ""), {})
                cells += [f"{e:.1f}" if (e := side.get("eager_us")) else "-" for side in (r["results"]["ours"], best)]
            lines.append(cells)
            for name, result in r["results"].items():
                notes += [f"{section} {r['name']}: {name} {k}: {result[k]}" for k in ("wrong", "failed") if k in result]
        texts.append(table([*header, *(["eager us", "its eager us"] if eager else [])], lines))
    return "\n\n".join(texts + ["\n".join(notes)] * bool(notes))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--rows", help="only rows whose name holds one of these texts, separated by ;")
    parser.add_argument("--flex", action="store_true", help="flex_attention too (it compiles for every row)")
    parser.add_argument("--seconds", type=float, default=150.0, help="rows that would begin later are left out")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a smoke test")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; default $OUT, else the working directory")
    args = parser.parse_args(argv)
    wanted = args.sections.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; choose of {', '.join(SECTIONS)}")
    begin = time.monotonic()
    limit, env = limits(args.tiny), environment()
    print(headline(limit, env), flush=True)
    todo = [row for section in wanted for row in rows() if row.section == section]
    if args.tiny:
        todo = list(dict.fromkeys(row.tiny() for row in todo))
    todo = [row for row in todo if args.rows is None or any(text in row.name for text in args.rows.split(";"))]
    makers = contenders(args.flex)
    measured: list[dict[str, Any]] = []
    for i, row in enumerate(todo):
        if time.monotonic() - begin > args.seconds:
            print(f"out of time: {len(todo) - i} rows left out, from {row.section} {row.name}", flush=True)
            break
        try:
            measured.append(measure(row, makers))
        except torch.OutOfMemoryError as error:
            print(f"{row.section} {row.name}: {_first_line(error)}", flush=True)
            continue
        found = measured[-1]["results"].items()
        short = ", ".join(f"{name} {r['us']:.1f}" if "us" in r else f"{name} -" for name, r in found)
        print(f"[{time.monotonic() - begin:.0f} s] {row.section} {row.name}: {short}", file=sys.stderr, flush=True)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    result = {"environment": env, "limits": limit, "command": sys.argv[1:], "rows": measured}
    path = write_json(result, args.out, "kernels")
    print(f"\n{report(measured, limit)}\n\n{path}")
    return int(any("wrong" in r["results"]["ours"] or "failed" in r["results"]["ours"] for r in measured))


if __name__ == "__main__":
    sys.exit(main())
