"""A small T5 through conversion and uptraining.

    python examples/encoder_decoder.py [--output FOLDER] [--tokens 400k] [--width 96]

A T5 learns span corruption on Python's own library, its self- and cross-attention is converted to fewer KV heads
(stock T5 knows no KV heads: the result loads wherever hf_attn_patch is imported), and it is uptrained with a tenth of
the tokens, distilling from the original. Every stage is a public command.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from demo import collect_text, hf_attn, make_folder, require_kv_heads, run_uptrain, say  # examples/demo.py
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

import hf_attn_patch  # noqa: F401  (registers the grouped T5)
from hf_attn_patch.training import Count

HEADS, BATCH = 8, 16


def make_t5(folder: Path, text: Path, width: int) -> None:
    """A tokenizer with T5's sentinels, trained on the text, and a T5 with random weights."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    with text.open(encoding="utf-8") as file:
        some = [json.loads(line)["text"] for line, _ in zip(file, range(200), strict=False)]
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<pad>", "</s>", *(f"<extra_id_{i}>" for i in range(20))]
    bpe.train_from_iterator(some, vocab_size=1024, special_tokens=special, show_progress=False)
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(bpe.to_str()), eos_token="</s>", pad_token="<pad>"
    )
    words.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=1024, d_model=width, d_kv=width // HEADS, d_ff=2 * width, num_layers=3, num_heads=HEADS,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)


def losses(folder: Path) -> tuple[float, float]:
    """Held-out loss before and after a training run."""
    entries = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    found = [entry["eval/loss"] for entry in entries if "eval/loss" in entry]
    return found[0], found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("encoder-decoder-output"))
    parser.add_argument("--tokens", type=Count, default=Count("400k"))
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--kv-heads", type=int, default=2)
    args = parser.parse_args()
    out = args.output
    if args.width < HEADS or args.width % HEADS:
        parser.error(f"--width {args.width} is no multiple of {HEADS}, which is the number of heads")
    if args.sequence_length < 2:
        parser.error("--sequence-length starts at 2: one to read, one to predict")
    if args.tokens // 10 < (least := args.sequence_length * BATCH):
        parser.error(f"--tokens {args.tokens}: a tenth of them has to fill a step of {least:,}; give {10 * least:,}")
    require_kv_heads(parser, [args.kv_heads], HEADS)
    make_folder(parser, out)
    common: dict[str, object] = {
        "sequence-length": args.sequence_length,
        "batch-size": BATCH,
        "micro-batch-size": BATCH,
    }
    common |= {
        "eval-dataset": out / "held-out.jsonl",
        "eval-tokens": 20_000,
        "eval-every": 10**9,
        "checkpoint-every": 0,
    }

    say(f"1. A T5 with {HEADS} heads learns span corruption")
    text = collect_text(out / "python.jsonl", more=False)
    make_t5(out / "new", text, args.width)
    run_uptrain(out / "new", out / "mha", text, {**common, "tokens": args.tokens, "lr": 3e-3})

    say(f"2. {HEADS} KV heads become {args.kv_heads}, in self- and cross-attention")
    hf_attn("convert", out / "mha", out / "gqa", "--kv-heads", args.kv_heads, "--overwrite")

    say("3. Uptraining with a tenth of the tokens")
    options = {**common, "tokens": args.tokens // 10, "lr": 1e-3, "warmup": 0.1, "teacher": out / "mha"}
    run_uptrain(out / "gqa", out / "uptrained", text, options)

    before, after = losses(out / "uptrained")
    print("\n| | held-out loss |\n|---|---|")
    print(f"| {HEADS} KV heads | {losses(out / 'mha')[1]:.3f} |")
    print(f"| {args.kv_heads} KV heads, converted | {before:.3f} |")
    print(f"| {args.kv_heads} KV heads, uptrained | {after:.3f} |")

    model = AutoModelForSeq2SeqLM.from_pretrained(out / "uptrained", trust_remote_code=False)
    words = AutoTokenizer.from_pretrained(out / "uptrained", trust_remote_code=False)
    source = words("def add(a, b):\n    return a<extra_id_0> b\n</s>", return_tensors="pt")
    filled = model.generate(input_ids=source["input_ids"], max_new_tokens=8)
    print(f"\n'return a ___ b' is filled with: {words.decode(filled[0])!r}")


if __name__ == "__main__":
    main()
