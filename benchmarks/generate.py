"""``model.generate`` end to end: transformers' own implementations and caches against this package's, in each form.

    python benchmarks/generate.py --out generate.json          # on one H100; again and again until no row is missing
    python benchmarks/generate.py --out generate.json --report # the tables of what is there
    python benchmarks/generate.py --small                      # a smoke test on a CPU

Half of Llama-3-8B (16 of its 32 layers) with random weights in bf16. Batches of several are padded on the left, to
lengths between half of the prompt's and all of it. For each row:

- to the first answer: seconds of the first call of all, with what is compiled and recorded in it; 32 tokens
- first token: milliseconds of a call for one token
- tokens/s: new tokens a second after the first, of a call for ``--tokens`` more
- of limit: that, over what reading the weights and the cache once a step would give at the copy rate of this run
- peak GiB: memory over the weights

Every token that a row chose is held against sdpa's logits for the same text (below best: the most that one was below
the best one, in standard deviations of its logits): it is the best one, or as good up to rounding, or the row fails;
but where the cache is of codes and so not exact. Rows that --out has already (of the same GPU and versions) are not
run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteria, StoppingCriteriaList

import hf_attn_patch
from benchmarks.measure import DEVICE, environment, headline, limits, median_seconds, peak_bytes, table, write_json
from hf_attn_patch.attn.codes import KINDS
from hf_attn_patch.compat.torch import compile_facts

OURS = "hf_attn_patch"
HALF_LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
}


class Never(StoppingCriteria):
    """Ends nothing, and is known to nobody: tokens are chosen one at a time."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Form:
    """An implementation, and what goes with it: the arguments of ``enable`` (ours alone) and of ``generate``."""

    name: str
    attention: str
    enable: tuple[tuple[str, Any], ...] | None = None
    static: bool = False
    one_by_one: bool = False
    sampling: bool = False


OFF = (("cache", None), ("cuda_graphs", False))
FORMS = (
    Form("sdpa", "sdpa"),
    Form("sdpa, static cache, compiled", "sdpa", static=True),
    Form("flash_attention_4", "flash_attention_4"),
    Form(OURS, OURS, OFF),
    Form(f"{OURS}, growing cache", OURS, (("cuda_graphs", False),)),
    Form("enable(model)", OURS, ()),
    Form('enable(model, cuda_graphs="unfused")', OURS, (("cuda_graphs", "unfused"),)),
    Form("enable(model), tokens chosen one at a time", OURS, (), one_by_one=True),
    Form("enable(model), sampling (top-k 50, top-p .9)", OURS, (), sampling=True),
    Form('enable(model, cuda_graphs="compiled")', OURS, (("cuda_graphs", "compiled"),)),
    Form('enable(model, cache="int8"), not exact', OURS, (("cache", "int8"),)),
    Form('enable(model, cache="fp8"), not exact', OURS, (("cache", "fp8"),)),
)


def build(sizes: dict[str, int], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def prompts(B: int, S: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Ids and mask [B, S]; rows but the last are padded on the left."""
    ids = torch.randint(2, vocabulary, (B, S), generator=torch.Generator().manual_seed(B + S))
    lengths = torch.linspace(S // 2, S, B).long() if B > 1 else torch.tensor([S])
    mask = (torch.arange(S) >= S - lengths[:, None]).long()
    return {"input_ids": ids.where(mask == 1, 0).to(DEVICE), "attention_mask": mask.to(DEVICE)}


def switch(model: Any, form: Form) -> None:
    torch.compiler.reset()
    if form.enable is None:
        hf_attn_patch.enable(model, cache=None, cuda_graphs=False)
        model.set_attn_implementation(form.attention)
    else:
        hf_attn_patch.enable(model, **dict(form.enable))


def generate(model: Any, form: Form, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    how: dict[str, Any] = {"do_sample": False}
    if form.sampling:
        how = {"do_sample": True, "top_k": 50, "top_p": 0.9, "temperature": 0.8}
    if form.static:
        how["cache_implementation"] = "static"
    if form.one_by_one:
        how["stopping_criteria"] = StoppingCriteriaList([Never()])
    out: torch.Tensor = model.generate(**inputs, max_new_tokens=tokens, **how)
    return out


@torch.no_grad()
def worst_choice(model: Any, inputs: dict[str, torch.Tensor], sequences: torch.Tensor) -> float:
    """How far a chosen token was below the best one by sdpa's logits for the whole text, in standard deviations."""
    S = inputs["input_ids"].shape[1]
    new = sequences.shape[1] - S
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=sequences, attention_mask=mask, position_ids=positions, logits_to_keep=new + 1).logits
    logits = logits[:, :-1].float()
    chosen = logits.gather(2, sequences[:, S:, None])[..., 0]
    return float(((logits.amax(-1) - chosen) / logits.std(-1)).max())


def is_coded(form: Form) -> bool:
    """Whether its cache holds codes of 8 bits, with which other tokens are to be expected."""
    return dict(form.enable or ()).get("cache") in KINDS


def bound(model: Any, form: Form, inputs: dict[str, torch.Tensor], tokens: int, copy_rate: float) -> float:
    """New tokens a second if a step read weights and cache once, at the rate of a copy."""
    config = model.config
    weights = sum(p.numel() for p in model.model.layers.parameters()) + model.lm_head.weight.numel()
    B = inputs["input_ids"].shape[0]
    keys = float(inputs["attention_mask"].sum()) + B * tokens / 2
    of_head = (
        config.head_dim + 4 if is_coded(form) else config.head_dim * model.dtype.itemsize
    )  # codes, and their scale in fp32
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * of_head * keys
    return B / ((weights * model.dtype.itemsize + cache) / copy_rate)


def measure(model: Any, form: Form, inputs: dict[str, torch.Tensor], tokens: int, repeats: int) -> dict[str, Any]:
    """One row, but for the limit."""
    switch(model, form)
    if form.static:  # one size for all calls, so that nothing is compiled anew between them
        model.generation_config.max_cache_len = inputs["input_ids"].shape[1] + 1 + max(tokens, 32)
    before, begin = compile_facts(), time.perf_counter()
    generate(model, form, inputs, 32).cpu()
    row: dict[str, Any] = {"first_answer_seconds": time.perf_counter() - begin}
    if spent := {name: value - before[name] for name, value in compile_facts().items() if value != before[name]}:
        row["compiling"] = spent  # of the first answer: a second process finds its graphs in inductor's cache
    peak = peak_bytes(lambda: generate(model, form, inputs, 1 + tokens))
    first = median_seconds(lambda: generate(model, form, inputs, 1), warmup=1, repeats=repeats, seconds=2.0)
    whole = median_seconds(lambda: generate(model, form, inputs, 1 + tokens), warmup=0, repeats=repeats, seconds=6.0)
    chosen = generate(model, form, inputs, 1 + min(tokens, 32))
    model.generation_config.max_cache_len = None
    switch(model, FORMS[0])
    if not form.sampling:
        worst = row["below_best"] = worst_choice(model, inputs, chosen)
        if not worst <= 0.25 and not is_coded(form):
            raise AssertionError(f"a token was {worst:.2f} standard deviations below the best one")
    B = inputs["input_ids"].shape[0]
    return row | {
        "first_token_seconds": first,
        "tokens_per_second": B * tokens / (whole - first),
        "peak_bytes": peak,
    }


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def _asked(form: Form, words: list[str]) -> bool:
    """Whether a word is a form's name, or is in it and no form's whole name."""
    names = [known.name for known in FORMS]
    return form.name in words or any(word in form.name for word in words if word not in names)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["form"], row["B"], row["prompt"]


def bench(args: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    begin = time.perf_counter()
    env, limit = environment(), limits(args.small)
    print(headline(limit, env), flush=True)
    same = before.get("environment", {})
    if same.get("device") == env["device"] and same.get("versions") == env["versions"]:
        known = {key(row): row for row in before["rows"] if "failed" not in row or not args.again}
    else:
        known = {}
    sizes, dtype = (SMALL, torch.float32) if args.small else (HALF_LLAMA_3_8B, torch.bfloat16)
    model = build(sizes, dtype)
    result = {"environment": env, "limits": limit, "sizes": sizes, "tokens": args.tokens, "rows": [*known.values()]}
    for S, B in args.shapes:
        inputs = prompts(B, S, sizes["vocab_size"])
        for form in FORMS:
            row: dict[str, Any] = {"form": form.name, "B": B, "prompt": S, "copy_bytes": limit["copy_bytes"]}
            if key(row) in known or not _asked(form, args.forms):
                continue
            if time.perf_counter() - begin > args.seconds:
                print("out of time (--seconds): run it again for the other rows", flush=True)
                return result
            try:
                row |= measure(model, form, inputs, args.tokens, args.repeats)
                row["of_limit"] = row["tokens_per_second"] / bound(
                    model, form, inputs, args.tokens, limit["copy_bytes"]
                )
            except Exception as error:  # reported in the table, and by the exit status if it is ours
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            free()
            result["rows"].append(row)
            write_json(result, args.out, "generate")
            speed = row.get("failed") or f"{row['tokens_per_second']:,.1f} tokens/s, {row['of_limit']:.2f} of the limit"
            print(f"  {time.perf_counter() - begin:4.0f} s  B {B}, prompt {S}, {form.name}: {speed}", flush=True)
            if "compiling" in row:
                told = ", ".join(f"{name} {value:.1f}" for name, value in row["compiling"].items())
                print(f"         compiling, of {row['first_answer_seconds']:.1f} s: {told}", flush=True)
    return result


def report(result: dict[str, Any]) -> str:
    """The tables, one for each shape."""
    order = [form.name for form in FORMS]
    parts = []
    for shape in sorted({(row["prompt"], row["B"]) for row in result["rows"]}):
        rows = [row for row in result["rows"] if (row["prompt"], row["B"]) == shape]
        lines = []
        for row in sorted(rows, key=lambda row: order.index(row["form"])):
            if "failed" in row:
                lines.append((row["form"], row["failed"][:60], "", "", "", "", ""))
                continue
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
            speed, share = f"{row['tokens_per_second']:,.0f}", f"{row['of_limit']:.2f}"
            first = f"{row['first_token_seconds'] * 1e3:.1f}"
            below = f"{row['below_best']:.2f}" if "below_best" in row else ""
            lines.append((row["form"], speed, share, first, f"{row['first_answer_seconds']:.1f}", peak, below))
        padded = f"{shape[1]} prompts of {shape[0] // 2:,} to {shape[0]:,} tokens, padded on the left"
        parts.append(f"### {padded if shape[1] > 1 else f'One prompt of {shape[0]:,} tokens'}\n")
        header = ("", "tokens/s", "of limit", "first token, ms", "to the first answer, s", "peak GiB", "below best")
        parts.append(table(header, lines) + "\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="512x1,2048x16,512x16,2048x1,512x64,2048x64,16384x1,16384x16")
    parser.add_argument("--forms", default="", help="names of forms, or words that their names have; comma-separated")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens after the first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=420, help="start no row after so many seconds")
    parser.add_argument("--again", action="store_true", help="run rows that failed again")
    parser.add_argument("--small", action="store_true", help="small shapes, to see it run on a CPU")
    parser.add_argument("--report", action="store_true", help="only print the tables of --out")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; default $OUT, else the working directory")
    args = parser.parse_args(argv)
    if args.small:
        args.shapes, args.tokens, args.repeats = "24x1,24x2", 16, 1
    args.shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes.split(",")]
    args.forms = args.forms.split(",")
    before = {}
    if args.out is not None and args.out.suffix == ".json" and args.out.exists():
        before = json.loads(args.out.read_text())
    if args.report:
        print(report(before))
        return 0
    result = bench(args, before)
    path = write_json(result, args.out, "generate")
    print(f"\n{report(result)}\n{path}")
    ours = [row for row in result["rows"] if "enable" in row["form"] or OURS in row["form"]]
    return int(any("failed" in row for row in ours))


if __name__ == "__main__":
    sys.exit(main())
