"""Decoding with the weights shared out to GPUs (``tp_plan="auto"``): transformers' sdpa against this package.

    python benchmarks/tensor_parallel.py [--gpus 1,2] [--out FOLDER]   # JSON to $OUT by default, after each of --gpus
    python benchmarks/tensor_parallel.py --gpus 2,4 --forms 'enable(model)' --batches 1   # a minute or two
    python benchmarks/tensor_parallel.py --small                       # a smoke test, two processes on a CPU

A quarter of Llama-3-8B (8 of its 32 layers, 32,000 words) with random weights in bf16; greedy tokens after a prompt of
512. tokens/s: new tokens a second after the first, of a call for ``--tokens`` more; the median of three. Every token is
held against sdpa's logits for the same text on the same GPUs: the best one, or as good up to rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from transformers import AutoModelForCausalLM

from benchmarks.generate import FORMS, HALF_LLAMA_3_8B, SMALL, build, generate, prompts, switch, worst_choice
from benchmarks.measure import DEVICE, environment, median_seconds, table, write_json
from hf_attn_patch.decoding.cuda_graphs import recording_of

SIZES = HALF_LLAMA_3_8B | {"num_hidden_layers": 8, "vocab_size": 32000}
#: of the forms of benchmarks/generate.py
WANTED = ("enable(model)", "sdpa", "hf_attn_patch, growing cache")


def measure(folder: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of this many GPUs; every process takes part, and the first one's are kept."""
    many = args.processes > 1
    dtype = torch.float32 if args.small else torch.bfloat16
    how: dict[str, Any] = {"tp_plan": "auto"} if many else {"device_map": DEVICE}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **how).eval()
    rows = []
    for B in map(int, args.batches.split(",")):
        inputs = prompts(B, 24 if args.small else 512, model.config.vocab_size)
        for form in (form for name in WANTED for form in FORMS if form.name == name and args.forms in name):
            if args.small and form.name == "enable(model)":
                continue  # nothing is recorded on a CPU
            switch(model, form)
            chosen = generate(model, form, inputs, 1 + args.tokens)

            def seconds(tokens: int, form: Any = form, inputs: Any = inputs) -> float:
                return median_seconds(
                    lambda: generate(model, form, inputs, tokens), warmup=0, repeats=args.repeats, seconds=60
                )

            speed = B * args.tokens / (seconds(1 + args.tokens) - seconds(1))
            memory = None if DEVICE == "cpu" else torch.cuda.memory_allocated()
            steps = recording_of(model)
            switch(model, FORMS[0])
            worst = worst_choice(model, inputs, chosen)
            if not worst <= 0.25:
                raise AssertionError(f"{form.name}: a token was {worst:.2f} standard deviations below the best one")
            rows.append({
                "gpus": args.processes, "form": form.name, "B": B, "tokens_per_second": speed,
                "allocated_bytes": memory, "worst_choice": worst, "steps": steps,
            })  # fmt: skip
            if not int(os.environ.get("RANK", 0)):
                print(
                    f"  {args.processes} GPU(s), B {B}, {form.name}: {speed:,.0f} tokens/s; steps {steps or 'as ever'}",
                    flush=True,
                )
    return rows


def worker(args: argparse.Namespace) -> None:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    rows = measure(args.worker, args)
    if rank == 0:
        Path(args.worker, f"rows-{args.processes}.json").write_text(json.dumps(rows))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="1,2", help="how many, one after the other")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens after the first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--forms", default="", help="those alone that have this in their name")
    parser.add_argument("--batches", default="1,16", help="batch sizes")
    parser.add_argument("--small", action="store_true", help="small shapes, to see it run on a CPU")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; default $OUT, else the working directory")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.small:
        args.tokens, args.repeats = 8, 1
    if args.worker:
        worker(args)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = build(SMALL if args.small else SIZES, torch.float32 if args.small else torch.bfloat16)
        model.save_pretrained(folder)
        del model
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        for count in map(int, args.gpus.split(",")):
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
            more = ["--small"] if args.small else ["--tokens", str(args.tokens), "--repeats", str(args.repeats)]
            more += ["--forms", args.forms, "--batches", args.batches]
            command = [sys.executable, *launch, __file__, "--worker", folder, "--processes", str(count), *more]
            subprocess.run(command, check=True)
            rows += json.loads(Path(folder, f"rows-{count}.json").read_text())
            write_json({"environment": environment(), "sizes": SIZES, "rows": rows}, args.out, "tensor_parallel")
    lines = [
        (str(row["gpus"]), str(row["B"]), row["form"], f"{row['tokens_per_second']:,.0f}",
         "" if row["allocated_bytes"] is None else f"{row['allocated_bytes'] / 2**30:.2f}")
        for row in rows
    ]  # fmt: skip
    print(table(("GPUs", "B", "", "tokens/s", "GiB on each"), lines))


if __name__ == "__main__":
    main()
