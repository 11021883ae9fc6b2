"""Generate with a model before and after: the text as it comes, then tokens/s side by side.

    python examples/generate.py MODEL [CONVERTED ...] [--prompt TEXT] [--max-new-tokens 128]

MODEL, a language model or an encoder-decoder one, runs with transformers' own attention and with hf_attn_patch; every
further model (a conversion, say) with hf_attn_patch.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
    TextStreamer,
)

import hf_attn_patch
from hf_attn_patch.compat.calls import cache_of, generate_keyword

#: how the classes that generate text are called
GENERATE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel", "EncoderDecoderModel")


def kv_bytes_per_token(cache: Any) -> int:
    """Bytes that a token has in a KV cache of one sequence, over the layers that cache one; of the decoder's tokens."""
    cache = getattr(cache, "self_attention_cache", cache)
    states = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(t.shape[1] * t.shape[3] * t.itemsize for t in states if t is not None and t.dim() == 4)


def load(name: str, attention: str, device: str) -> tuple[Any, Any]:
    """(model, tokenizer)."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        config, tokenizer = (
            AutoConfig.from_pretrained(name, trust_remote_code=False),
            AutoTokenizer.from_pretrained(name, trust_remote_code=False),
        )
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if config.architectures and not any(a.endswith(GENERATE) for a in config.architectures):
            raise ValueError(f"{config.architectures[0]} generates no text")
        model = kind.from_pretrained(name, dtype=dtype, attn_implementation=attention, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SystemExit(
            f"generate: {name} cannot be loaded with {attention}: {' '.join(str(error).split())[:300]}"
        ) from None
    return model.to(device).eval(), tokenizer


def generate(name: str, attention: str, args: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load(name, attention, args.device)
    prompt, encodes = tokenizer(args.prompt, return_tensors="pt").to(args.device), model.config.is_encoder_decoder
    prompt.pop("token_type_ids", None)
    if not prompt["input_ids"].numel():
        raise SystemExit(f"generate: {name}'s tokenizer makes no token of {args.prompt!r}; give a longer --prompt")
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest and prompt["input_ids"].shape[1] * (not encodes) + args.max_new_tokens > longest:
        raise SystemExit(f"generate: {name} has {longest} positions: shorten the prompt or lower --max-new-tokens")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": pad}
    print(f"\n== {name} with {attention}\n", flush=True)
    # the first call warms up, and shows the text; the cache of the timed one grows in place with hf_attn_patch
    streamer = TextStreamer(tokenizer, skip_prompt=not encodes)
    text = model.generate(**prompt, **options, max_new_tokens=args.max_new_tokens, streamer=streamer)
    if attention == "hf_attn_patch":
        cache: Any = hf_attn_patch.GrowingCache(config=model.config.get_text_config(decoder=True))
        options[generate_keyword()] = EncoderDecoderCache(cache, DynamicCache()) if encodes else cache
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = model.generate(
        **prompt, **options, max_new_tokens=args.max_new_tokens, min_new_tokens=args.max_new_tokens,
        return_dict_in_generate=True,
    )  # fmt: skip
    read = 1 if encodes else prompt["input_ids"].shape[1]  # an encoder reads the prompt: the decoder has its start
    new = out.sequences.shape[1] - read  # on the host, so the device is done
    rate = new / (time.perf_counter() - start)
    return {
        "model": name, "attention": attention, "rate": rate, "kv": kv_bytes_per_token(cache_of(out)),
        "text": text[0, read:].tolist(),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--prompt", default="def read_lines(path):\n")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--before", default="sdpa", help="transformers' attention to compare with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.max_new_tokens < 1:
        parser.error("--max-new-tokens starts at 1")
    runs = [(args.models[0], args.before), *((name, "hf_attn_patch") for name in args.models)]
    rows = [generate(name, attention, args) for name, attention in runs]
    print("\n| model | attention | KV bytes a token | tokens/s |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['model']} | {row['attention']} | {row['kv']:,} | {row['rate']:,.1f} |")
    return rows


if __name__ == "__main__":
    main()
