"""``model.generate_batch`` (continuous batching): transformers' own path against this package's.

    python benchmarks/generate_batch.py [--out FOLDER]   # JSON to $OUT by default; transformers 5.20 or later
    python benchmarks/generate_batch.py --small          # a smoke test on a CPU

A quarter of Llama-3-8B (8 of its 32 layers, 32,000 words) with random weights in bf16. Prompts begin with the same
tokens (a system prompt), whose pages transformers shares, and end with their own, 32 or more; greedy. tokens/s: all new
tokens over the time from the first request to the last token, of a call after one that warmed everything up.
CUDA graphs are as transformers decides, but where a row says otherwise. Some answers are held against sdpa's logits for
the same text: every token is the best one, or as good up to rounding.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.generate import OURS, SMALL, build, free, worst_choice
from benchmarks.measure import DEVICE, environment, table, write_json
from benchmarks.tensor_parallel import SIZES


class Form(NamedTuple):
    """An implementation, and what its batching config says."""

    name: str
    attention: str
    batching: dict[str, Any]


PAGE = 256 if DEVICE == "cuda" else 16
FORMS = (  # the quickest first, for those whose time is short
    Form(f"{OURS}, block tables, CUDA graphs", OURS, {"max_blocks_per_request": 16, "use_cuda_graph": (False, True)}),
    Form(OURS, OURS, {}),
    Form(f"{OURS}, block tables", OURS, {"max_blocks_per_request": 16, "use_cuda_graph": False}),
    Form("sdpa", "sdpa", {}),
    Form("sdpa, nothing shared", "sdpa", {"allow_block_sharing": False}),
)


def requests(count: int, shared: int, own: int, vocabulary: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    first = torch.randint(2, vocabulary, (shared,), generator=draw).tolist()
    lengths = torch.linspace(min(32, own), own, count).long().tolist()
    return [first + torch.randint(2, vocabulary, (n,), generator=draw).tolist() for n in lengths]


def answers(model: Any, form: Form, prompts: list[list[int]], tokens: int, args: argparse.Namespace) -> list[Any]:
    model.set_attn_implementation(form.attention)
    sizes = {"num_blocks": 128, "max_batch_tokens": 64} if args.small else {}
    batching = ContinuousBatchingConfig(page_size=PAGE, **sizes, **form.batching)
    generation = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=batching, record_timestamps=True
    )
    if len(found) != len(prompts) or any(len(out.generated_tokens) != tokens for out in found.values()):
        raise AssertionError("not every request was answered")
    return list(found.values())


def measure(model: Any, form: Form, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    answers(model, form, prompts[:4], 4, args)
    free()
    begin = time.perf_counter()
    found = answers(model, form, prompts, args.tokens, args)
    whole = time.perf_counter() - begin
    seconds = max(out.timestamps[-1] for out in found) - min(out.created_time for out in found)
    model.set_attn_implementation("sdpa")
    worst = 0.0
    for i in range(0, len(found), max(1, len(found) // 4)):
        ids = torch.tensor([prompts[i]], device=DEVICE)
        told = torch.tensor([found[i].generated_tokens], device=DEVICE)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        worst = max(worst, worst_choice(model, inputs, torch.cat([ids, told], 1)))
    if not worst <= 0.25:
        raise AssertionError(f"a token was {worst:.2f} standard deviations below the best one")
    tokens = sum(len(out.generated_tokens) for out in found)
    return {"tokens_per_second": tokens / seconds, "call_seconds": whole, "worst_choice": worst}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--shared", type=int, default=512, help="tokens that all prompts begin with")
    parser.add_argument("--own", type=int, default=512, help="tokens of its own that the longest prompt has")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens of each")
    parser.add_argument("--seconds", type=float, default=300, help="start no row after so many seconds")
    parser.add_argument("--small", action="store_true", help="small shapes, to see it run on a CPU")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; default $OUT, else the working directory")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    if args.small:
        args.requests, args.shared, args.own, args.tokens = 6, 40, 24, 8
    sizes = SMALL if args.small else SIZES
    model = build(sizes, torch.float32 if args.small else torch.bfloat16)
    prompts = requests(args.requests, args.shared, args.own, sizes["vocab_size"])
    rows: list[dict[str, Any]] = []
    known = {name: getattr(args, name) for name in ("requests", "shared", "own", "tokens")}
    for form in FORMS:
        if time.perf_counter() - begin > args.seconds:
            break
        row: dict[str, Any] = {"form": form.name}
        try:
            row |= measure(model, form, prompts, args)
        except Exception as error:  # reported in the table, and by the exit status if it is ours
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        free()
        rows.append(row)
        told = row.get("failed") or f"{row['tokens_per_second']:,.0f} tokens/s, {row['call_seconds']:.1f} s a call"
        print(f"  {time.perf_counter() - begin:4.0f} s  {form.name}: {told}", flush=True)
        write_json({"environment": environment(), "sizes": sizes, **known, "rows": rows}, args.out, "generate_batch")
    lines = [
        (row["form"], row["failed"][:60], "")
        if "failed" in row
        else (row["form"], f"{row['tokens_per_second']:,.0f}", f"{row['call_seconds']:.1f}")
        for row in rows
    ]
    print(table(("", "tokens/s", "whole call, s"), lines))
    return int(any("failed" in row for row in rows if OURS in row["form"]))


if __name__ == "__main__":
    sys.exit(main())
