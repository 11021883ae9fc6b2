"""Whole models, tokens a second: transformers with this package's attention, cache and unpadding, against its own.

    python benchmarks/models.py                          # under four minutes on one H200
    python benchmarks/models.py --sections decode,train --peers sdpa --kv-heads 8,32
    python benchmarks/models.py --tiny                   # a smoke test on a CPU

Llama-2-7B's shapes with 8 layers and random weights, in bf16. Every implementation first passes the conformance rule on
a two-layer model; then, at each row's own shape, its logits (or loss and gradients) are held against transformers' sdpa
before it is timed. Peers and ours run in one process on the same weights and inputs. "Real" tokens are those that are
not padding. Decoding calls the model as generate() does, on a cache that is filled with random keys and values.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch

from benchmarks.measure import DEVICE, environment, headline, limits, median_seconds, synchronize, table, write_json
from benchmarks.model_calls import FULL, TINY, assert_agrees, build, check_conformance, switch, work_of
from benchmarks.model_rows import OURS, ROWS, Inputs, Row, Variant, variants

PEERS = ("sdpa", "flash_attention_4", "flex_attention", "eager")


def bound(model: Any, row: Row, inputs: Inputs, limit: dict[str, float]) -> float:
    """The seconds that the bytes (decode) or the arithmetic (prefill, training) take at this machine's limits."""
    config = model.config
    layer_weights = sum(p.numel() for p in model.model.layers.parameters())
    head_weights = model.lm_head.weight.numel()
    width = config.num_attention_heads * config.head_dim
    if row.kind == "decode":
        kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * inputs.tokens
        return (kv + layer_weights + head_weights) * model.dtype.itemsize / limit["copy_bytes"]
    pairs = sum(n * (n + 1) // 2 for n in inputs.lengths)
    head_tokens = inputs.tokens if row.kind == "train" else row.B
    flops = 2 * (layer_weights * inputs.tokens + head_weights * head_tokens)
    flops += 4 * width * pairs * config.num_hidden_layers
    return (3 if row.kind == "train" else 1) * flops / limit["matmul_flops"]


def measure(model: Any, row: Row, variant: Variant, inputs: Inputs, reference: list[torch.Tensor]) -> float:
    """Median seconds of one call, after it was found to be right."""
    model.train(row.kind == "train")
    with switch(model, variant):
        work, result = work_of(model, row, variant, inputs)
        assert_agrees(result(), reference)
        repeats = {"decode": 25, "prefill": 7, "train": 5}[row.kind]
        return median_seconds(work, warmup=2, repeats=repeats, seconds=3.0)


def plan(args: argparse.Namespace) -> Iterator[tuple[int, Row, Variant]]:
    """Ours and the fast peers first, so that what time is left for goes to the slow ones."""
    fast = tuple(p for p in args.peers if p in ("sdpa", "flash_attention_4"))
    slow = tuple(p for p in args.peers if p not in fast)
    for peers, ours in ((fast, True), (slow, False)):
        for kv_heads in args.kv_heads:
            for row in args.rows:
                if kv_heads in row.kv_heads:
                    for variant in variants(row, peers, args.static):
                        if ours or variant.attention != OURS:
                            yield kv_heads, row, variant


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def bench(args: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    limit, env = limits(args.tiny), environment()
    print(headline(limit, env), flush=True)
    sizes, dtype = (TINY, torch.float32) if args.tiny else (FULL, torch.bfloat16)
    results: list[dict[str, Any]] = []
    conforms: dict[Variant, str] = {}
    built, at, inputs, reference = None, None, None, None
    model: Any = None
    for kv_heads, row, variant in plan(args):
        entry: dict[str, Any] = {"work": row.name, "implementation": variant.name, **asdict(row), "kv_heads": kv_heads}
        results.append(entry)
        if time.perf_counter() - begin > args.seconds:
            entry["failed"] = "not run: out of time (--seconds)"
            continue
        try:
            if variant not in conforms:
                conforms[variant] = ""
                try:
                    check_conformance(variant, kv_heads, sizes, dtype)
                except Exception as error:
                    conforms[variant] = f"{type(error).__name__}: {error}".splitlines()[0]
                free()
            if conforms[variant]:
                raise RuntimeError(conforms[variant])
            if built != kv_heads:
                model = inputs = reference = None
                free()
                model, built, at = build(kv_heads, sizes, dtype), kv_heads, None
            if at != row:
                at, inputs = row, Inputs(row, sizes["vocab_size"])
                sdpa = Variant("sdpa")
                model.train(row.kind == "train")
                with switch(model, sdpa):
                    reference = work_of(model, row, sdpa, inputs)[1]()
            assert inputs is not None
            assert reference is not None
            seconds = measure(model, row, variant, inputs, reference)
            tokens = row.B if row.kind == "decode" else inputs.tokens
            entry |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
            entry["share_of_limit"] = bound(model, row, inputs, limit) / seconds
        except Exception as error:  # reported in the table, and by the exit status if it is ours
            entry["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if model is not None:
            model.zero_grad(set_to_none=True)
        free()
        speed = entry.get("failed") or f"{entry['tokens_per_second']:,.0f} tokens/s"
        print(f"  {row.name}, {kv_heads} KV heads, {variant.name}: {speed}", flush=True)
    synchronize()
    return {
        "environment": env,
        "limits": limit,
        "sizes": sizes,
        "seconds": time.perf_counter() - begin,
        "rows": results,
    }


def report(result: dict[str, Any]) -> str:
    lines = []
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in result["rows"]:
        groups.setdefault((entry["work"], entry["kv_heads"]), []).append(entry)
    for (work, kv_heads), entries in groups.items():
        peers = [e["tokens_per_second"] for e in entries if not e["implementation"].startswith(OURS) and "seconds" in e]
        for e in entries:
            if "seconds" not in e:
                lines.append((work, str(kv_heads), e["implementation"], e["failed"][:60], "", "", ""))
                continue
            ratio = f"{e['tokens_per_second'] / max(peers):.2f}" if peers else ""
            speed, share = f"{e['tokens_per_second']:,.0f}", f"{e['share_of_limit']:.2f}"
            lines.append((work, str(kv_heads), e["implementation"], speed, f"{e['seconds'] * 1e3:.2f}", ratio, share))
    return table(("work", "KV heads", "implementation", "tokens/s", "ms", "x best peer", "of limit"), lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="decode,prefill,train", help="kinds of work, comma-separated")
    parser.add_argument("--peers", default=",".join(PEERS), help="implementations to compare with; '' for none")
    parser.add_argument("--kv-heads", default="8,32,1", help="of 32 query heads")
    parser.add_argument("--forms", default="full,padded,packed")
    parser.add_argument("--static", action="store_true", help="StaticCache and torch.compile too, in decoding")
    parser.add_argument("--seconds", type=float, default=220, help="start nothing after so many seconds")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see it run on a CPU")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; default $OUT, else the working directory")
    args = parser.parse_args(argv)
    args.peers = tuple(p for p in args.peers.split(",") if p)
    args.kv_heads = tuple(int(n) for n in args.kv_heads.split(","))
    kinds, forms = args.sections.split(","), args.forms.split(",")
    args.rows = [row for row in ROWS if row.kind in kinds and row.form in forms]
    if args.tiny:
        args.rows = [Row(r.kind, min(r.B, 3), 128, r.form, r.kv_heads) for r in args.rows if r.S < 20000]
        args.peers = tuple(p for p in args.peers if p in ("sdpa", "eager"))
    result = bench(args)
    text = report(result)
    path = write_json(result, args.out, "models")
    print(f"\n{text}\n\n{result['seconds']:.0f} s; {path}")
    ours = [e for e in result["rows"] if e["implementation"].startswith(OURS)]
    return int(any("failed" in e and "out of time" not in e["failed"] for e in ours))


if __name__ == "__main__":
    sys.exit(main())
