"""N answers to one prompt: the kernel over shared keys, and ``generate`` with a prompt that is kept once.

    python benchmarks/shared_prompt.py [--quick] [--parts kernels,tokens,generate] [--out FOLDER]

First everything that is timed is checked: the kernel against fp64 by the rule that kernels are held to, and the tokens
of ``generate`` in fp32 against transformers' own. Then kernel times (one layer of a decoding step, cold L2, by CUDA
graph replays) beside this package's decode kernel on keys that each row has for itself, and ``generate`` for half of
Llama-3-8B: the prompt's time, the cache's bytes, tokens a second. Ends with tables and JSON to $OUT.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_attn_patch
from benchmarks import assert_conforms
from benchmarks.gpu_timing import replayed
from benchmarks.measure import DEVICE, environment, headline, limits, table, write_json
from hf_attn_patch.attn.kernels.decode import grouped_decode
from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_reference
from hf_attn_patch.attn.kernels.shared_decode import shared_decode
from hf_attn_patch.attn.shared import Parted, Rows, SharedPart
from hf_attn_patch.compat.generation import PREFILL
from hf_attn_patch.decoding.cuda_graphs import recording_of

HALF_LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
SMALL = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 8192,
}  # fmt: skip
NO_END = {"eos_token_id": None, "pad_token_id": 0}
SCALE = 128**-0.5
#: (prompts, answers to each, keys of a prompt, keys of an answer)
KERNEL_ROWS = [
    (1, 4, 8192, 128), (1, 16, 512, 128), (1, 16, 2048, 128), (1, 16, 8192, 128), (1, 16, 32768, 128),
    (1, 64, 8192, 128), (4, 16, 2048, 128), (4, 16, 8192, 512), (8, 8, 8192, 512),
]  # fmt: skip


COPIED = "each its own, copied from one prompt before, recorded"
#: (prompts, answers to each, tokens of a prompt, new tokens)
SHAPES = [(1, 16, 2048, 128), (1, 16, 8192, 128), (1, 16, 32768, 128), (4, 16, 2048, 128)]


def parted(prompts: int, answers: int, keys: int, own: int, dtype: torch.dtype, padded: bool = False) -> Any:
    """q [B, 32, 1, 128], the parts, and a mask of prompts that are padded on the left."""
    B = prompts * answers
    rows = Rows([p for p in range(prompts) for _ in range(answers)], prompts)
    q = torch.randn(B, 1, 32, 128, dtype=dtype, device=DEVICE).transpose(1, 2)
    shared = [torch.randn(prompts, 8, keys, 128, dtype=dtype, device=DEVICE) for _ in "kv"]
    mine = [torch.randn(B, 8, own, 128, dtype=dtype, device=DEVICE) for _ in "kv"]
    mask = None
    if padded:
        first = torch.arange(prompts, device=DEVICE).repeat_interleave(answers) * (keys // (2 * prompts))
        mask = (torch.arange(keys + own, device=DEVICE) >= first[:, None])[:, None, None]
    return q, Parted((SharedPart(shared[0], shared[1], rows),), mine[0], mine[1]), mask


def check_kernel() -> None:
    for shape in ((1, 16, 4099, 77), (3, 5, 1500, 130), (2, 40, 700, 9), (4, 1, 2000, 64)):
        for padded in (False, True):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                q, parts, mask = parted(*shape, dtype, padded)
                k, v = parts.make(0), parts.make(1)
                options = {"scale": 128**-0.5, "causal": mask is None, "mask": mask}
                out = shared_decode(q, parts, **options)
                assert torch.equal(out, shared_decode(q, parts, **options)), "not the same twice"
                low = grouped_decode_reference(q, k, v, **options)[0]
                ref = grouped_decode_reference(q.double(), k.double(), v.double(), **options)[0]
                assert_conforms(out, low, ref)
    print("kernel: conforms", flush=True)


CALLS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "greedy": ([0, 0, 0, 1, 1, 1], {}),
    "sampled": ([0, 1], {"do_sample": True, "num_return_sequences": 8}),
    "beams": ([0, 1], {"num_beams": 4, "num_return_sequences": 2}),
    "uneven": ([0, 0, 0, 1, 0, 0], {"do_sample": True}),
}


def check_tokens(quick: bool) -> None:
    """fp32: the tokens of sdpa with a DynamicCache, of the parts, and of the parts in recorded steps."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, **NO_END, initializer_range=0.1)).eval()
    ids = torch.randint(3, 1000, (2, 700), device=DEVICE)
    mask = torch.ones_like(ids)
    for padding in (133,) if quick else (0, 133):
        mask[1, :padding] = 0
        for name, (rows, options) in CALLS.items():
            inputs = {"input_ids": ids[rows], "attention_mask": mask[rows], "max_new_tokens": 80, **options}
            hf_attn_patch.enable(model, cache=None, cuda_graphs=False)
            model.set_attn_implementation("sdpa")
            found = []
            for graphs in (None, False, True):
                if graphs is not None:
                    hf_attn_patch.enable(model, cache="growing", cuda_graphs=graphs)
                torch.manual_seed(1)
                found.append(model.generate(**inputs, return_dict_in_generate=graphs is not None))
                if graphs is not None:
                    out = found.pop()
                    cache = out.get("past_key_values", out.get("cache"))
                    assert cache.layers[0].shared, name
                    found.append(out.sequences)
            for other in found[1:]:
                assert torch.equal(found[0], other), (name, padding, (found[0] != other).sum())
            print(f"tokens: {name}, {padding} of padding: the same", flush=True)


def kernel_rows(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for shape in KERNEL_ROWS[3:5] if quick else KERNEL_ROWS:
        prompts, answers, keys, own = shape
        entry: dict[str, Any] = dict(zip(("prompts", "answers", "keys", "own"), shape, strict=True))
        shared_bytes = prompts * keys * 8 * 128 * 4
        own_bytes = prompts * answers * own * 8 * 128 * 4
        entry["bytes"] = shared_bytes + own_bytes
        sets = max(2, min(16, int(2e8 // entry["bytes"])))
        inputs = [parted(*shape, torch.bfloat16) for _ in range(sets)]
        entry["shared_us"] = replayed(lambda i, inputs=inputs: shared_decode(*inputs[i][:2], scale=SCALE), sets)  # type: ignore[misc]
        if prompts * answers * (keys + own) * 4096 * 2 < 40e9:
            whole = [(q, parts.make(0), parts.make(1)) for q, parts, _ in inputs[: max(1, min(2, sets))]]
            entry["today_us"] = replayed(lambda i, whole=whole: grouped_decode(*whole[i], scale=SCALE), len(whole))  # type: ignore[misc]
        rows.append(entry)
        print(entry, flush=True)
        del inputs
    return rows


def cache_bytes(cache: Any) -> int:
    """The memory of a cache, each piece once; room and all."""
    pieces: dict[Any, Any] = {}
    for layer in cache.layers:
        tensors = [*(layer.own.keys, layer.own.values)] if getattr(layer, "shared", ()) else [layer.keys, layer.values]
        tensors += [t for part in getattr(layer, "shared", ()) for t in part[:2]]
        pieces |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(pieces.values())


def generate_row(model: Any, ids: torch.Tensor, answers: int, new: int, name: str) -> dict[str, Any]:
    """The prompt's seconds, the cache's bytes, tokens a second after the first; medians of three, if that is quick."""

    copied = name == COPIED

    def once(tokens: int, **options: Any) -> tuple[float, Any]:
        rows = ids
        if copied:
            cache = hf_attn_patch.GrowingCache(config=model.config, expected_length=ids.shape[1] + tokens)
            with torch.no_grad():
                model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
            cache.begin_rows([row for row in range(len(ids)) for _ in range(answers)], share=False)
            rows, options = ids.repeat_interleave(answers, 0), {**options, "past_key_values": cache}
        else:
            options = {**options, "num_return_sequences": answers}
        torch.cuda.synchronize()
        begin = time.perf_counter()
        out = model.generate(rows, max_new_tokens=tokens, do_sample=True, **options)
        torch.cuda.synchronize()
        return time.perf_counter() - begin, out

    once(new)  # what is compiled, tuned and recorded for the first time
    took, out = once(new, return_dict_in_generate=True)
    held = cache_bytes(out.get("past_key_values", out.get("cache")))
    del out
    repeats = 3 if took < 4 else 1
    first = statistics.median(once(1)[0] for _ in range(repeats))
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    whole = statistics.median(once(new)[0] for _ in range(repeats)) if took < 4 else took
    peak = torch.cuda.max_memory_allocated() - weights
    rate = ids.shape[0] * answers * (new - 1) / (whole - first)
    row = {"name": name, "prompts": ids.shape[0], "answers": answers, "prompt": ids.shape[1], "new": new}
    row |= {"first_s": first, "whole_s": whole, "tokens_s": rate, "cache_bytes": held, "peak_bytes": peak}
    print(row, f"{recording_of(model)}", flush=True)
    return row


def generate_rows(quick: bool) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = LlamaConfig(**HALF_LLAMA_3_8B, **NO_END)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    for prompts, answers, length, new in SHAPES[:3] if quick else SHAPES:
        ids = torch.randint(3, 128000, (prompts, length), device=DEVICE)
        variants = ["shared, recorded", "each its own, recorded", "sdpa"]
        if length > 8192:  # sixteen prompts at once need more memory than there is
            variants[1] = COPIED
        if not quick:
            variants.insert(1, "shared")
        for variant in variants:
            if variant == "sdpa":
                if length > 2048:
                    continue
                hf_attn_patch.enable(model, cache=None, cuda_graphs=False)
                model.set_attn_implementation("sdpa")
            else:
                hf_attn_patch.enable(model, cache="growing", cuda_graphs="recorded" in variant)
                if "own" in variant and variant != COPIED:
                    model.__dict__.pop(PREFILL)
            yield generate_row(model, ids, answers, new, variant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", default="kernels,tokens,generate", help="what is run; comma-separated")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with torch.inference_mode(False), torch.no_grad():
        result: dict[str, Any] = {**environment(), "limits": limits(), "kernels": [], "generate": []}
        if "kernels" in args.parts:
            check_kernel()
            result["kernels"] = kernel_rows(args.quick)
            write_json(result, args.out, "shared_prompt")
        if "tokens" in args.parts:
            check_tokens(args.quick)
        if "generate" in args.parts:
            for row in generate_rows(args.quick):
                result["generate"].append(row)
                write_json(result, args.out, "shared_prompt")  # as far as it came
    print(report(result))


def report(result: dict[str, Any]) -> str:
    """The Markdown tables of a run."""
    copy = result["limits"]["copy_bytes"]
    kernels = [
        [
            f"{r['prompts']} x {r['answers']}", f"{r['keys']:,}", f"{r['own']:,}", f"{r['shared_us']:.1f}",
            f"{r['today_us']:.1f}" if "today_us" in r else "",
            f"{r['today_us'] / r['shared_us']:.1f}" if "today_us" in r else "",
            f"{r['bytes'] / r['shared_us'] * 1e6 / copy:.2f}",
        ]
        for r in result["kernels"]
    ]  # fmt: skip
    header = ["prompts x answers", "prompt", "own", "shared, us", "each its own, us", "faster", "of copy"]
    text = [headline(result["limits"], result), "", table(header, kernels)] if kernels else []
    if result["generate"]:
        header = [
            "prompts x answers",
            "prompt",
            "",
            "first token, s",
            "all, s",
            "tokens/s after the first",
            "cache, GB",
            "peak, GB",
        ]
        rows = [
            [
                f"{r['prompts']} x {r['answers']}", f"{r['prompt']:,}", r["name"],
                f"{r['first_s']:.3f}", f"{r['whole_s']:.3f}", f"{r['tokens_s']:,.0f}",
                f"{r['cache_bytes'] / 1e9:.2f}", f"{r['peak_bytes'] / 1e9:.2f}",
            ]
            for r in result["generate"]
        ]  # fmt: skip
        text += ["", table(header, rows)]
    return "\n".join(text)


if __name__ == "__main__":
    main()
