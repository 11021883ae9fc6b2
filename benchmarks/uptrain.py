"""Tokens/s and MFU of uptraining on one GPU: this package's loop against its peers, one table, JSON to $OUT.

    python benchmarks/uptrain.py [--shape 1b] [--steps 25] [--rows ours,sdpa,...] [--work FOLDER]

Every row is a process of its own on the same model (random weights), the same packed text (Python's own library) and
the same batch: AdamW, bf16 arithmetic on fp32 weights, no gradient checkpointing.

    ours            examples/uptrain.py with attn_implementation hf_attn_patch
    ours-compile    ... and --compile
    teacher         ours, distilling from a teacher of the same size
    teacher-compile ... and --compile
    forward         the teacher's forward alone, logits and all: what `teacher` may cost more than `ours`
    forward-compile ... and its layers compiled
    sdpa            the same loop with attn_implementation sdpa
    flash4          the same loop with flash_attention_4, if FlashAttention-4 is installed
    plain-sdpa      a loop that lets the model make its own logits and loss, attn_implementation sdpa
    trl             TRL's SFTTrainer, packing="wrapped" (it lets documents see each other), sdpa
    trl-compile     ... and its torch_compile
    trl-flash4      TRL's SFTTrainer, packing by documents, flash_attention_4
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch

ROOT = Path(__file__).parents[1]
ROWS = [
    "ours", "ours-compile", "teacher", "teacher-compile", "forward", "forward-compile", "sdpa", "flash4", "plain-sdpa",
    "trl", "trl-compile", "trl-flash4",
]  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    # Llama 3.2 1B
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 8192,
           "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 8192},
}  # fmt: skip


def prepare(work: Path, shape: str) -> None:
    """The model, its tokenizer and the text, once for all rows."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = work / "text.jsonl"
    if not text.exists():
        library = Path(os.__file__).parent
        files = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.relative_to(library).parts)
        lines = [json.dumps({"text": p.read_text(errors="replace")}) + "\n" for p in files]
        text.write_text("".join(lines))
    model = work / shape
    if not (model / "config.json").exists():
        bpe = tokenizers.ByteLevelBPETokenizer()
        texts = (json.loads(line)["text"] for line in text.open())
        bpe.train_from_iterator(itertools.islice(texts, 300), vocab_size=1000, special_tokens=["<eos>"])
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(bpe.to_str()), eos_token="<eos>", pad_token="<eos>"
        ).save_pretrained(model)
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            made = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=0))
        made.to(torch.bfloat16).save_pretrained(model)


def uptrain_options(row: str, args: argparse.Namespace) -> list[str]:
    attention = {"sdpa": "sdpa", "plain-sdpa": "sdpa", "flash4": "flash_attention_4"}.get(row, "hf_attn_patch")
    options = {
        "model": args.work / args.shape, "dataset": args.work / "text.jsonl", "output": args.work / "out",
        "sequence-length": args.length, "batch-size": args.sequences, "micro-batch-size": args.sequences,
        "tokens": args.steps * args.sequences * args.length, "eval-tokens": 0, "checkpoint-every": 0,
        "attn-implementation": attention,
    }  # fmt: skip
    if row in ("teacher", "teacher-compile"):
        options["teacher"] = options["model"]
    flags = ["--compile"] if row.endswith("-compile") else []
    return [part for k, v in options.items() for part in (f"--{k}", str(v))] + flags


def run_ours(row: str, args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import load_script
    from hf_attn_patch.training import load_run, parse_options

    run = load_run(parse_options(uptrain_options(row, args)))
    if row.startswith("forward"):
        return time_forward(run, args)
    if row == "plain-sdpa":
        plain_loss(run.objective)
    run.save_model = lambda *_: None  # type: ignore[method-assign]  # not what is measured
    load_script("examples/uptrain.py").uptrain(run)
    late = run.speed.steps[len(run.speed.steps) // 2 :]
    seconds = statistics.median(seconds for seconds, _, _ in late)
    flops = statistics.mean(flops for _, _, flops in late)
    mfu = flops / seconds / run.peak_flops if run.peak_flops else None
    return {"tokens_per_second": late[-1][1] / seconds, "mfu": mfu}


def plain_loss(objective: Any) -> None:
    """Let the model make whole logits and its own loss, as an ordinary training loop does."""
    from hf_attn_patch.losses.chunked import LossSums

    def forward(batch: Any, told: Any = None, mode: str = "loss") -> Any:
        if mode == "check":
            return None
        out = objective.model(**objective.arguments(batch)).logits.float()
        valid = batch.labels != -100
        loss = torch.nn.functional.cross_entropy(out[valid], batch.labels[valid], reduction="sum")
        return LossSums(loss, loss.detach(), torch.zeros_like(loss), valid.sum())

    objective.forward = forward


@torch.no_grad()
def time_forward(run: Any, args: argparse.Namespace) -> dict[str, Any]:
    from hf_attn_patch.training.data.stream import Position

    device = run.accelerator.device
    model = run.student.to(device, torch.bfloat16).eval()
    if run.options.compile:
        run.objective.compile_layers()
    steps = list(itertools.islice(run.data.steps(Position(), 0, 1), 5))
    batches = [run.data.framing.collate(step.micro[0]).to(device) for step in steps]
    for _ in range(2):  # the first time warms up
        wait()
        start = time.perf_counter()
        for batch in batches:
            model(**run.objective.arguments(batch))
        wait()
    seconds = time.perf_counter() - start
    return {"tokens_per_second": len(batches) * args.sequences * args.length / seconds, "mfu": None}


def run_trl(row: str, args: argparse.Namespace) -> dict[str, Any]:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait()
            self.times.append(time.perf_counter())

    flash = row == "trl-flash4"
    model = AutoModelForCausalLM.from_pretrained(
        args.work / args.shape,
        dtype=torch.float32,
        trust_remote_code=False,
        attn_implementation="flash_attention_4" if flash else "sdpa",
    )
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(args.work / args.shape, trust_remote_code=False),
        train_dataset=datasets.load_dataset("json", data_files=str(args.work / "text.jsonl"), split="train"),
        args=SFTConfig(
            output_dir=str(args.work / "trl"), max_steps=args.steps, per_device_train_batch_size=args.sequences,
            max_length=args.length, packing=True, packing_strategy="bfd" if flash else "wrapped",
            gradient_checkpointing=False, bf16=torch.cuda.is_available(), save_strategy="no", report_to=[],
            logging_steps=10**6, optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
            dataset_text_field="text", max_grad_norm=1.0, torch_compile=row == "trl-compile",
        ),
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    late = clock.times[len(clock.times) // 2 :]
    seconds = statistics.median(b - a for a, b in itertools.pairwise(late))
    return {"tokens_per_second": args.sequences * args.length / seconds, "mfu": None}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def missing(row: str) -> str | None:
    needed = (["trl", "datasets"] if row.startswith("trl") else []) + (["flash_attn"] if "flash4" in row else [])
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{absent[0]} is not installed" if absent else None


def first_cause(error: BaseException) -> str:
    """What went wrong first, and where: a lazy import, for one, reports only what came of it."""
    seen = {id(error)}
    while (earlier := error.__cause__ or error.__context__) is not None and id(earlier) not in seen:
        seen.add(id(earlier))
        error = earlier
    places = traceback.extract_tb(error.__traceback__)
    where = f" ({places[-1].filename}:{places[-1].lineno})" if places else ""
    return f"{type(error).__name__}: {error}{where}"


def one_row(row: str, args: argparse.Namespace) -> None:
    start = time.perf_counter()
    try:
        found = run_trl(row, args) if row.startswith("trl") else run_ours(row, args)
    except Exception as error:
        print("FAILED " + json.dumps(first_cause(error)))
        raise
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    print("RESULT " + json.dumps({**found, "peak_gib": peak, "seconds": time.perf_counter() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=4, help="of --length in a step")
    parser.add_argument("--work", type=Path, default=Path("/tmp/hf-attn-uptrain-benchmark"))
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a row")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        one_row(args.row, args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args.work, args.shape)
    results: dict[str, Any] = {}
    for row in args.rows.split(","):
        why = missing(row)
        if why is None:
            call = [sys.executable, __file__, *sys.argv[1:], "--row", row]
            try:
                done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=args.limit)
            except subprocess.TimeoutExpired as error:
                why, said = f"not done after {args.limit} s", {}
                print((error.stderr or b"").decode(errors="replace"), file=sys.stderr)
            else:
                kept = [line for line in done.stdout.splitlines() if line.startswith(("RESULT ", "FAILED "))]
                said = dict(line.split(" ", 1) for line in kept)
                if "RESULT" not in said:
                    why = f"failed: {json.loads(said['FAILED'])[-300:] if 'FAILED' in said else done.returncode}"
                    print(done.stderr, file=sys.stderr)
        results[row] = {"why": why} if why else json.loads(said["RESULT"])
        print(row, results[row], flush=True)
    report(results, args)


def conclude(speeds: dict[str, float]) -> None:
    """Against the best peer, and what a teacher costs."""
    peers = {row: speed for row, speed in speeds.items() if not row.startswith(("ours", "teacher", "forward"))}
    for row in ("ours", "ours-compile"):
        if row in speeds and peers:
            best = max(peers, key=lambda name: peers[name])
            print(f"\n{row}: {speeds[row] / peers[best]:.2f} times {best}, the fastest of the others")
    for how in ("", "-compile"):
        if speeds.keys() >= {taught := f"teacher{how}", alone := f"ours{how}", forward := f"forward{how}"}:
            cost = (1 / speeds[taught] - 1 / speeds[alone]) * speeds[forward]
            print(f"\n{taught}: the teacher costs {cost:.2f} of its {forward}")


def report(results: dict[str, Any], args: argparse.Namespace) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{device}, {args.shape}, {args.sequences} x {args.length} packed tokens a step\n")
    print("| | tokens/s | MFU | peak GiB |\n|---|---|---|---|")
    for row, found in results.items():
        if found.get("why"):
            print(f"| {row} | {found['why']} | | |")
            continue
        mfu = f"{found['mfu']:.1%}" if found["mfu"] else ""
        peak = f"{found['peak_gib']:.1f}" if found["peak_gib"] else ""
        print(f"| {row} | {found['tokens_per_second']:,.0f} | {mfu} | {peak} |")
    conclude({row: found["tokens_per_second"] for row, found in results.items() if not found.get("why")})
    if os.environ.get("OUT"):
        Path(os.environ["OUT"], "uptrain.json").write_text(json.dumps({"device": device, **results}, indent=1))


if __name__ == "__main__":
    main()
