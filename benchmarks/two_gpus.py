"""The same loss curve on one GPU and on two (FSDP2, DeepSpeed or DDP), for the same tokens.

    python benchmarks/two_gpus.py [--config fsdp2|deepspeed_zero2|ddp] [--tokens 500k] [--short] [--work FOLDER]

In fp32 the two differ by nothing but the order of sums: the largest difference may be 1e-4 nats. In bf16 that order
alone moves a curve, so the same run on one GPU is cut into other micro-batches, and two GPUs may differ from one by
twice what those runs differ by among themselves (``--short`` leaves them out; two GPUs are then held to twice what
they differed by when last measured). Ends with a table, JSON to $OUT, and fails if a limit is passed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch

from benchmarks.uptrain import SHAPES, prepare

ROOT = Path(__file__).parents[1]
SHAPES["curve"] = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 1024, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip


#: (name, GPUs, precision, sequences at a time on each GPU)
RUNS = [
    ("fp32, one GPU", 1, "no", 2),
    ("fp32, two GPUs", 2, "no", 2),
    ("bf16, one GPU", 1, "bf16", 2),
    ("bf16, one GPU, 1 at a time", 1, "bf16", 1),
    ("bf16, one GPU, 4 at a time", 1, "bf16", 4),
    ("bf16, two GPUs", 2, "bf16", 2),
]
SHORT = [run for run in RUNS if run[3] == 2]
FP32_LIMIT = 1e-4
SHORT_BF16_LIMIT = 2e-2  # twice the spread in results/two_gpus.md


def curve(
    run: tuple[str, int, str, int], work: Path, args: argparse.Namespace, gpu: int | None = None
) -> list[dict[str, Any]]:
    """The training log of one run, a process (or two) of its own, on one ``gpu`` or on all that are seen."""
    name, gpus, precision, micro = run
    config = args.config if gpus == 2 else "cpu" if args.cpu else "single_gpu"
    if args.cpu and config == "fsdp2":  # accelerate has it on GPUs only
        config = "ddp"
    output = work / name.replace(", ", "-").replace(" ", "-")
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "model": work / "converted", "teacher": work / args.shape, "dataset": work / "text.jsonl", "output": output,
        "tokens": args.tokens, "sequence-length": args.length, "batch-size": 8, "micro-batch-size": micro, "lr": 1e-3,
        "ce": 1, "held-out-every": 20, "eval-tokens": 8 * args.length, "eval-every": 10,
        "checkpoint-every": 0, "precision": precision,
    }  # fmt: skip
    launch = ["-m", "accelerate.commands.launch", "--config_file", f"examples/accelerate/{config}.yaml"]
    if args.cpu and config == "deepspeed_zero2":
        launch.append("tests/helpers/deepspeed_on_cpu.py")
    script = ["examples/uptrain.py", *(part for k, v in options.items() for part in (f"--{k}", str(v)))]
    seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    begun = time.perf_counter()
    subprocess.run([sys.executable, *launch, *script], check=True, cwd=ROOT, env={**os.environ, **seen})
    entries = [json.loads(line) for line in (output / "training_log.jsonl").open()]
    seconds = time.perf_counter() - begun
    print(f"{name}: held-out loss at the end {losses(entries)[-1]:.4f}, {seconds:.0f} s in all", flush=True)
    return entries


def all_curves(work: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The runs on one GPU side by side, one on each; then those on two."""
    runs = SHORT if args.short else RUNS
    alone, together = ([run for run in runs if run[1] == n] for n in (1, 2))
    if args.cpu:
        return {run[0]: curve(run, work, args) for run in runs}
    gpus = [int(gpu) for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2]]

    def lane(i: int) -> list[Any]:
        return [curve(run, work, args, gpus[i]) for run in alone[i :: len(gpus)]]

    with ThreadPoolExecutor(len(gpus)) as pool:
        found = list(pool.map(lane, range(len(gpus))))
    curves = {run[0]: found[i % len(gpus)][i // len(gpus)] for i, run in enumerate(alone)}
    curves |= {run[0]: curve(run, work, args) for run in together}
    return {run[0]: curves[run[0]] for run in runs}


def losses(entries: list[dict[str, Any]]) -> list[float]:
    """Of every step and every evaluation."""
    return [e["train/loss"] if "train/loss" in e else e["eval/loss"] for e in entries]


def difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    """The largest difference of two curves over the same steps, in nats."""
    return max(abs(x - y) for x, y in zip(losses(a), losses(b), strict=True))


def verdicts(curves: dict[str, list[dict[str, Any]]]) -> list[tuple[str, float, float]]:
    """(precision, largest difference of one and two GPUs, limit)."""
    fp32, bf16 = ([name for name in curves if name.startswith(kind)] for kind in ("fp32", "bf16"))
    alone = bf16[:-1]
    spread = [difference(curves[a], curves[b]) for a, b in itertools.combinations(alone, 2)]
    return [
        ("fp32", difference(*(curves[name] for name in fp32)), FP32_LIMIT),
        ("bf16", difference(curves[alone[0]], curves[bf16[-1]]), 2 * max(spread) if spread else SHORT_BF16_LIMIT),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=["fsdp2", "deepspeed_zero2", "ddp"], default="fsdp2", help="on two GPUs")
    parser.add_argument("--short", action="store_true", help="one run on one GPU in each precision")
    parser.add_argument("--tokens", default="500k")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--shape", choices=SHAPES, default="curve")
    parser.add_argument("--work", type=Path, default=Path("/tmp/hf-attn-two-gpus"))
    parser.add_argument("--cpu", action="store_true", help="CPU processes (DDP for FSDP2) instead of GPUs, for a trial")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args.work, args.shape)
    convert = "from hf_attn_patch.cli import main; main()"
    source, converted = str(args.work / args.shape), str(args.work / "converted")
    subprocess.run(
        [sys.executable, "-c", convert, "convert", source, converted, "--kv-heads", "2", "--overwrite"], check=True
    )
    curves = all_curves(args.work, args)
    print("\n| step | " + " | ".join(curves) + " |\n|" + "---|" * (len(curves) + 1))
    rows = list(zip(*(losses(entries) for entries in curves.values()), strict=True))
    for index, (entry, row) in enumerate(zip(next(iter(curves.values())), rows, strict=True)):
        if "eval/loss" in entry or index % 10 == 0:
            kind = " (held-out)" if "eval/loss" in entry else ""
            print(f"| {entry['step']}{kind} | " + " | ".join(f"{loss:.4f}" for loss in row) + " |")
    speeds = [[e["train/tokens_per_second"] for e in entries if "train/loss" in e] for entries in curves.values()]
    print("| tokens/s | " + " | ".join(f"{statistics.median(found):,.0f}" for found in speeds) + " |")
    found = verdicts(curves)
    for precision, worst, limit in found:
        print(f"\n{precision}: one and two GPUs differ by {worst:.2g} nats at most; the limit is {limit:.2g}")
    if os.environ.get("OUT"):
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        record = {"device": name, "config": args.config, "verdicts": found, "curves": curves}
        Path(os.environ["OUT"], "two_gpus.json").write_text(json.dumps(record))
    sys.exit(any(worst > limit for _, worst, limit in found))


if __name__ == "__main__":
    main()
