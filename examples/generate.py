"""Generate with a model before and after: the text as it comes, then tokens/s side by side.

    python examples/generate.py MODEL [CONVERTED ...] [--prompt TEXT] [--max-new-tokens 128]

MODEL runs with transformers' own attention and with hf_attn_patch; every further model (a conversion, say) with
hf_attn_patch.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import hf_attn_patch


def kv_bytes_per_token(model: Any) -> int:
    """Bytes of KV cache that one more token costs."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def generate(name: str, attention: str, args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(name)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention).to(args.device)
    model.eval()
    prompt = tokenizer(args.prompt, return_tensors="pt").to(args.device)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id}
    print(f"\n== {name} with {attention}\n", flush=True)
    # the first call warms up, and shows the text; the cache of the timed one grows in place with hf_attn_patch
    text = model.generate(
        **prompt, **options, max_new_tokens=args.max_new_tokens, streamer=TextStreamer(tokenizer, skip_prompt=True)
    )
    if attention == "hf_attn_patch":
        options["past_key_values"] = hf_attn_patch.GrowingCache(config=model.config)
    if args.device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = model.generate(
        **prompt, **options, max_new_tokens=args.max_new_tokens, min_new_tokens=args.max_new_tokens
    )  # fmt: skip
    new = out.shape[1] - prompt["input_ids"].shape[1]
    rate = new / (time.perf_counter() - start)
    return {
        "model": name, "attention": attention, "rate": rate, "kv": kv_bytes_per_token(model),
        "text": text[0, prompt["input_ids"].shape[1] :].tolist(),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--prompt", default="def read_lines(path):\n")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--before", default="sdpa", help="transformers' attention to compare with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    runs = [(args.models[0], args.before), *((name, "hf_attn_patch") for name in args.models)]
    rows = [generate(name, attention, args) for name, attention in runs]
    print("\n| model | attention | KV bytes a token | tokens/s |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['model']} | {row['attention']} | {row['kv']:,} | {row['rate']:,.1f} |")
    return rows


if __name__ == "__main__":
    main()
