"""One training step on one very long document: time and memory, against what standard attention would need.

    python examples/long_context.py [--tokens 65536 131072] [--model MODEL]

Standard attention keeps the scores and the probabilities of all pairs of tokens: 2 x HQ x S^2 numbers in each layer
(one layer at a time with gradient checkpointing, as here). hf_attn_patch keeps none of them, and the loss is computed
from hidden states in chunks, so that the S x V logits don't stand either.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import hf_attn_patch  # noqa: F401  (registers the implementation)
from hf_attn_patch.losses.output_head import head_of
from hf_attn_patch.training import linear_loss

SHAPES = {
    # Llama 3.2 1B
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 1, "vocab_size": 256},
}  # fmt: skip


def shape_of(name: str) -> Any:
    """The config of a causal language model whose decoder is its ``model``, with ``lm_head`` behind it."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SystemExit(f"long_context: {name} has no config: {' '.join(str(error).split())[:300]}") from None
    with torch.device("meta"):
        try:
            AutoModelForCausalLM.from_config(config).model.get_input_embeddings()
        except (AttributeError, ValueError):
            raise SystemExit(f"long_context: {name} ({config.model_type}) is not built like Llama") from None
    return config


def standard_bytes(config: Any, S: int, itemsize: int) -> int:
    """Scores and probabilities of one layer, HQ x S x S each."""
    return int(2 * config.num_attention_heads * S * S * itemsize)


def step(config: Any, S: int, args: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="hf_attn_patch")
        ids = torch.randint(0, config.vocab_size, (1, S))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    seconds = 0.0
    for _ in range(2):  # the first step warms up
        if args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        hidden = model.model(input_ids=ids, use_cache=False)[0]
        sums = linear_loss(hidden[0, :-1], head_of(model), ids[0, 1:])
        (sums.loss / sums.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    return {
        "tokens": S, "seconds": seconds, "peak": peak, "standard": standard_bytes(config, S, dtype.itemsize),
        "logits": S * config.vocab_size * 4, "loss": float(sums.loss.detach() / sums.labels),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="65536 131072; on a CPU 2048 4096")
    parser.add_argument("--shape", choices=SHAPES, help="1b; on a CPU tiny")
    parser.add_argument("--model", help="the shape of this model instead (a Llama-like one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    on_cpu = args.device == "cpu"
    args.tokens = args.tokens or ([2048, 4096] if on_cpu else [65536, 131072])
    if min(args.tokens) < 2:
        parser.error("--tokens starts at 2: one to read, one to predict")
    config = shape_of(args.model) if args.model else LlamaConfig(**SHAPES[args.shape or ("tiny" if on_cpu else "1b")])
    config.max_position_embeddings = max(args.tokens)
    rows = []
    for S in args.tokens:
        try:
            rows.append(step(config, S, args))
        except torch.OutOfMemoryError:
            raise SystemExit(f"long_context: {S:,} tokens do not fit on this device; give fewer --tokens") from None
    print("| tokens | s a step | tokens/s | peak memory | scores of standard attention, a layer | fp32 logits |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        peak = f"{row['peak'] / 2**30:.1f} GiB" if row["peak"] else "not measured on a CPU"
        needed = " | ".join(f"{row[key] / 2**30:,.2f} GiB" for key in ("standard", "logits"))
        rate = f"{row['seconds']:.2f} | {row['tokens'] / row['seconds']:,.0f}"
        print(f"| {row['tokens']:,} | {rate} | {peak} | {needed} |")
    return rows


if __name__ == "__main__":
    main()
