"""The same loss curve on one GPU and on two (FSDP2, student and teacher sharded), for the same tokens.

    python benchmarks/two_gpus.py [--tokens 1M] [--work FOLDER]

Ends with a table, JSON to $OUT, and fails if two losses differ by more than 2e-2 nats (bf16 sums in another order).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
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


def curve(name: str, launcher: list[str], work: Path, teacher: Path, tokens: str) -> list[dict[str, Any]]:
    output = work / name
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "model": work / "converted", "teacher": teacher, "dataset": work / "text.jsonl", "output": output,
        "tokens": tokens, "sequence-length": 2048, "batch-size": 8, "micro-batch-size": 2, "lr": 1e-3, "ce": 1,
        "held-out-every": 20, "eval-tokens": "64k", "checkpoint-every": 0,
    }  # fmt: skip
    script = [str(ROOT / "examples" / "uptrain.py"), *(part for k, v in options.items() for part in (f"--{k}", str(v)))]
    subprocess.run([sys.executable, "-m", *launcher, *script], check=True, cwd=ROOT)
    return [json.loads(line) for line in (output / "training_log.jsonl").open()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1M")
    parser.add_argument("--shape", choices=SHAPES, default="curve")
    parser.add_argument("--work", type=Path, default=Path("/tmp/hf-attn-two-gpus"))
    parser.add_argument("--cpu", action="store_true", help="two CPU processes instead of two GPUs, to try the script")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args.work, args.shape)
    convert = "from hf_attn_patch.cli import main; main()"
    source, converted = str(args.work / args.shape), str(args.work / "converted")
    subprocess.run(
        [sys.executable, "-c", convert, "convert", source, converted, "--kv-heads", "2", "--overwrite"], check=True
    )
    configs = ROOT / "examples" / "accelerate"
    if args.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        one, two = (["torch.distributed.run", "--nproc_per_node", n] for n in ("1", "2"))
    else:
        launch = ["accelerate.commands.launch", "--config_file"]
        one, two = ([*launch, str(configs / f"{name}.yaml")] for name in ("single_gpu", "fsdp2"))
    alone, together = (
        curve(n, c, args.work, args.work / args.shape, args.tokens) for n, c in (("one", one), ("two", two))
    )
    assert [e["step"] for e in alone] == [e["step"] for e in together]
    worst = 0.0
    print("| step | one | two |\n|---|---|---|")
    for index, (a, b) in enumerate(zip(alone, together, strict=True)):
        key = "train/loss" if "train/loss" in a else "eval/loss"
        worst = max(worst, abs(a[key] - b[key]))
        if key == "eval/loss" or index % 10 == 0:
            print(f"| {a['step']} ({key}) | {a[key]:.4f} | {b[key]:.4f} |")
    speeds = [entries[-2].get("train/tokens_per_second", 0.0) for entries in (alone, together)]
    print(f"\nlargest difference {worst:.2g} nats; tokens/s {speeds[0]:,.0f} and {speeds[1]:,.0f}")
    if os.environ.get("OUT"):
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        found = {"device": name, "worst": worst, "one": alone, "two": together}
        Path(os.environ["OUT"], "two_gpus.json").write_text(json.dumps(found))
    sys.exit(worst > 2e-2)


if __name__ == "__main__":
    main()
