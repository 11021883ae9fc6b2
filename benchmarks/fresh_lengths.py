"""Batches of lengths that were never seen before, beside the same batches once more.

    python benchmarks/fresh_lengths.py [--out FOLDER]   # on a GPU
    python benchmarks/fresh_lengths.py --small          # a smoke test on a CPU

Real batches have other lengths each time, and kernels may plan, tune or compile for each length: torch's cuDNN
attention plans anew for each shape. Tables of one length in a loop do not show that; tables of fresh lengths alone show
everybody at their worst. So here are both, for a prompt's forward and for a training step on padded batches: a Llama of
Llama-2-7B's widths with 8 layers and 8 KV heads. Every implementation is given the same batches, in the same order, in
a process that has warmed up on other lengths; its results are held against sdpa's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch

from benchmarks.measure import DEVICE, environment, headline, limits, synchronize, table, write_json
from benchmarks.model_calls import FULL, TINY, build, switch
from benchmarks.model_rows import OURS, Variant

VARIANTS = (Variant("sdpa"), Variant("flash_attention_4"), Variant(OURS), Variant(OURS, unpadded=True))
ROWS = [(kind, v) for kind in ("prompt", "training") for v in VARIANTS if kind == "training" or not v.unpadded]
Batch = dict[str, torch.Tensor]


def batches(count: int, B: int, longest: int, vocabulary: int, seed: int) -> list[Batch]:
    """Batches [B, S], no two of one S, padded on the right; rows have S/4 to S tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randperm(longest // 2, generator=generator)[:count] + longest // 2 + 1
    made = []
    for S in lengths.tolist():
        ids = torch.randint(2, vocabulary, (B, S), generator=generator)
        rows = torch.randint(S // 4, S + 1, (B, 1), generator=generator)
        rows[0] = S
        mask = (torch.arange(S) < rows).long()
        labels = ids.where(mask == 1, -100)
        made.append({"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE), "labels": labels.to(DEVICE)})
    return made


def forward(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        out = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=1)
    first: torch.Tensor = out.logits[0, -1].float()  # of the row without padding
    return first.std()


def training(model: Any, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(**batch, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


KINDS: dict[str, Callable[[Any, Batch], torch.Tensor]] = {"prompt": forward, "training": training}


def timed(work: Callable[[Any, Batch], torch.Tensor], model: Any, some: list[Batch]) -> tuple[list[float], list[float]]:
    """Seconds of each batch, and what came out."""
    seconds, results = [], []
    for batch in some:
        synchronize()
        begin = time.perf_counter()
        result = work(model, batch)
        synchronize()
        seconds.append(time.perf_counter() - begin)
        results.append(float(result))
    return seconds, results


def measure(model: Any, kind: str, variant: Variant, warm: list[Batch], some: list[Batch]) -> dict[str, Any]:
    model.train(kind == "training")
    with switch(model, variant):
        timed(KINDS[kind], model, warm)
        fresh, results = timed(KINDS[kind], model, some)
        repeated, again = timed(KINDS[kind], model, some)
    assert all(abs(a - b) <= 2e-2 * abs(a) for a, b in zip(results, again, strict=True))
    tokens = statistics.mean(float(batch["attention_mask"].sum()) for batch in some)
    row: dict[str, Any] = {"kind": kind, "variant": variant.name, "results": results, "tokens": tokens}
    for name, seconds in (("fresh", fresh), ("repeated", repeated)):
        row |= {f"{name}_seconds": statistics.median(seconds), f"{name}_most_seconds": max(seconds)}
    return row


def bench(small: bool, out: Path | None) -> dict[str, Any]:
    sizes, dtype = (TINY, torch.float32) if small else (FULL, torch.bfloat16)
    model = build(8, sizes, dtype)
    result: dict[str, Any] = {**environment(), "limits": limits(small), "rows": []}
    count, B, longest = (3, 2, 48) if small else (16, 8, 2048)
    for kind in KINDS:
        warm = batches(3, B, longest + 64, sizes["vocab_size"], 1)
        taken = {batch["input_ids"].shape[1] for batch in warm}
        some = [b for b in batches(count, B, longest, sizes["vocab_size"], 0) if b["input_ids"].shape[1] not in taken]
        first: list[float] | None = None
        for variant in (v for k, v in ROWS if k == kind):
            try:
                row = measure(model, kind, variant, warm, some)
            except Exception as error:  # told in the table
                row = {"kind": kind, "variant": variant.name, "failed": f"{type(error).__name__}: {error}"[:100]}
            else:
                first = first or row["results"]
                far = max(abs(a - b) / abs(a) for a, b in zip(first, row["results"], strict=True))
                if far > 2e-2:
                    row = {"kind": kind, "variant": variant.name, "failed": f"another result than sdpa's, by {far:.2g}"}
            result["rows"].append(row)
            print(row, flush=True)
            write_json(result, out, "fresh_lengths")
    return result


def report(result: dict[str, Any]) -> str:
    header = ["", "", "fresh, ms", "slowest", "repeated, ms", "slowest", "real tokens/s, fresh", "repeated"]
    lines = []
    for r in result["rows"]:
        if "failed" in r:
            lines.append([r["kind"], r["variant"], r["failed"], *[""] * 5])
            continue
        numbers = [f"{r[f'{n}_{s}'] * 1e3:.1f}" for n in ("fresh", "repeated") for s in ("seconds", "most_seconds")]
        rates = [f"{r['tokens'] / r[n + '_seconds']:,.0f}" for n in ("fresh", "repeated")]
        lines.append([r["kind"], r["variant"], *numbers, *rates])
    return headline(result["limits"], result) + "\n\n" + table(header, lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small shapes, to see it run on a CPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    result = bench(args.small, args.out)
    print(report(result))
    return int(any("failed" in row for row in result["rows"] if OURS in row["variant"]))


if __name__ == "__main__":
    sys.exit(main())
