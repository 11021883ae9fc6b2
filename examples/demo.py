"""The whole story on this machine: train a small multi-head model, convert it, uptrain it, compare.

    python examples/demo.py [--output demo-output] [--size auto|tiny|cpu|gpu]

A Llama with 8 heads learns to write Python from Python's own library. It is converted to 2 and to 1 KV heads, by
averaging heads (the GQA paper's way) and by aligning them first, and each result is uptrained with 5% of the tokens,
distilling from the original. Every stage is a public command, printed before it runs. Without a GPU this takes a few
minutes on two cores; with one, a larger model is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent
HEADS = 8


@dataclass(frozen=True)
class Size:
    """One size of the demo: the model's shape, and how much it reads."""

    width: int
    layers: int
    vocabulary: int
    tokens: int
    sequence: int
    batch: int
    micro: int
    lr: float
    eval_tokens: int


SIZES = {
    "tiny": Size(64, 2, 512, 40_000, 128, 8, 8, 3e-3, 4_000),
    "cpu": Size(128, 4, 1024, 800_000, 256, 4, 4, 5e-3, 20_000),
    "gpu": Size(512, 8, 8192, 60_000_000, 1024, 64, 32, 1e-3, 500_000),
}
#: the methods that are compared: the paper's, and the best one here
METHODS = {"mean": ["--method", "mean"], "aligned": ["--method", "aligned"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--size", choices=["auto", *SIZES], default="auto")
    args = parser.parse_args()
    import torch

    name = args.size if args.size != "auto" else "gpu" if torch.cuda.is_available() else "cpu"
    size, out = SIZES[name], args.output
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    say(f"1. A model with {HEADS} heads, made anew, learns Python from Python's own library ({size.tokens:,} tokens)")
    text, held_out = collect_text(out / "python.jsonl"), out / "held-out.jsonl"
    make_model(out / "new", text, size)
    common: dict[str, object] = {
        "sequence-length": size.sequence, "batch-size": size.batch, "micro-batch-size": size.micro, "warmup": 0.1,
        "eval-dataset": held_out, "eval-tokens": size.eval_tokens, "eval-every": 10**9, "checkpoint-every": 0,
    }  # fmt: skip
    run_uptrain(out / "new", out / "mha", text, {**common, "tokens": size.tokens, "lr": size.lr})

    say(f"2. Fewer KV heads: {HEADS} become 2 and 1, by {' and by '.join(METHODS)}")
    for kv_heads in (2, 1):
        for method, options in METHODS.items():
            target = out / f"{method}-{kv_heads}"
            hf_attn("convert", out / "mha", target, "--kv-heads", kv_heads, *options, "--overwrite")

    say("3. Uptraining with 5% of the tokens, the multi-head model as teacher")
    for kv_heads in (2, 1):
        for method in METHODS:
            source, to = out / f"{method}-{kv_heads}", out / f"{method}-{kv_heads}-uptrained"
            options = {**common, "tokens": size.tokens // 20, "lr": size.lr / 3, "teacher": out / "mha"}
            run_uptrain(source, to, text, options)

    say("4. All of them measured on held-out text")
    models = [out / "mha", *(out / f"{m}-{k}{e}" for k in (2, 1) for m in METHODS for e in ("", "-uptrained"))]
    measure = ["--text", held_out, "--source", out / "mha", "--context", size.sequence, "--tokens", size.eval_tokens]
    hf_attn("evaluate", *models, *measure)

    rows = collect(out)
    figure = draw(rows, out / "quality_over_kv_bytes.png")
    say("5. What came of it (held-out text)")
    print(table(rows))
    if figure:
        print(f"\nThe same as a figure: {figure}")
    print(f"\nAll of this took {(time.monotonic() - started) / 60:.1f} minutes. With a model of your own:\n")
    print(f"    hf-attn convert YOUR_MODEL converted --kv-heads 8 {' '.join(METHODS['aligned'])}")
    print(
        "    accelerate launch examples/uptrain.py --model converted --teacher YOUR_MODEL --dataset YOUR_TEXT"
        " --tokens 50M --output uptrained"
    )
    print('    AutoModelForCausalLM.from_pretrained("uptrained", attn_implementation="hf_attn_patch")')


def say(text: str) -> None:
    print(f"\n== {text}\n", flush=True)


def run(command: list[str], shown: list[str] | None = None) -> None:
    """Print a command as a user would type it, and run it with its progress in sight."""
    print("$ " + shlex.join(shown or command), flush=True)
    quiet = {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}  # everything is here already
    done = subprocess.run(command, env={**os.environ, **quiet}, check=False)
    if done.returncode:
        sys.exit(f"demo: this failed: {shlex.join(shown or command)}")


def hf_attn(*arguments: object) -> None:
    words = [str(a) for a in arguments]
    run([sys.executable, "-c", "from hf_attn_patch.cli import main; main()", *words], ["hf-attn", *words])


def run_uptrain(model: Path, output: Path, text: Path, options: dict[str, object]) -> None:
    """examples/uptrain.py, with ``options`` by their names on the command line."""
    given = {"model": model, "dataset": text, "output": output, **options}
    words = [str(EXAMPLES / "uptrain.py")] + [part for k, v in given.items() for part in (f"--{k}", str(v))]
    run([sys.executable, *words], ["python", *words])


def collect_text(path: Path) -> Path:
    """Python's own library as JSONL, one file a document, in mixed order; a few go to ``held-out.jsonl`` beside it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in library.rglob("*.py") if not {"site-packages", "dist-packages", "test"} & set(p.parts))
    random.Random(0).shuffle(files)
    for target, some in ((path, files[40:]), (path.with_name("held-out.jsonl"), files[:40])):
        with target.open("w", encoding="utf-8") as file:
            for source in some:
                file.write(json.dumps({"text": source.read_text(encoding="utf-8", errors="replace")}) + "\n")
    return path


def make_model(folder: Path, text: Path, size: Size) -> None:
    """A tokenizer trained on the text, and a Llama with random weights."""
    import tokenizers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    with text.open(encoding="utf-8") as file:
        some = [json.loads(line)["text"] for line, _ in zip(file, range(400), strict=False)]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(some, vocab_size=size.vocabulary, special_tokens=["<eos>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.width * 8 // 3 // 8 * 8,
        num_hidden_layers=size.layers, num_attention_heads=HEADS, num_key_value_heads=HEADS, bos_token_id=None,
        eos_token_id=0, pad_token_id=0, max_position_embeddings=2048, tie_word_embeddings=True,
        initializer_range=0.05 if size.width < 256 else 0.02,  # narrow models start faster from wider weights
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    kv_heads: int
    kv_bytes: int
    converted: float | None
    uptrained: float


def kv_bytes(folder: Path) -> tuple[int, int]:
    """KV heads, and bytes of KV cache per token in bf16."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    heads = config["num_key_value_heads"]
    return heads, 2 * 2 * config["num_hidden_layers"] * heads * config["head_dim"]


def losses(folder: Path) -> tuple[float, float]:
    """Held-out loss before and after a training run."""
    entries = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    found = [entry["eval/loss"] for entry in entries if "eval/loss" in entry]
    return found[0], found[-1]


def collect(out: Path) -> list[Row]:
    rows = [Row("multi-head", *kv_bytes(out / "mha"), None, losses(out / "mha")[1])]
    for kv_heads in (2, 1):
        for method in METHODS:
            folder = out / f"{method}-{kv_heads}-uptrained"
            rows.append(Row(method, *kv_bytes(folder), *losses(folder)))
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| | KV heads | KV bytes a token | loss as converted | loss after 5% |", "|---|---|---|---|---|"]
    for row in rows:
        before = f"{row.converted:.3f}" if row.converted is not None else ""
        lines.append(f"| {row.name} | {row.kv_heads} | {row.kv_bytes:,} | {before} | {row.uptrained:.3f} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> Path | None:
    """Loss over KV bytes, as converted (dotted) and uptrained (solid); None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("(no figure: pip install 'hf-attn-patch[plot]')")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = pyplot.figure(figsize=(6, 4), layout="constrained").gca()
    full = rows[0]
    axes.axhline(full.uptrained, color="grey", linewidth=0.8, label="multi-head")
    for color, method in zip(("tab:orange", "tab:blue"), METHODS, strict=True):
        points = [(full.kv_bytes, full.uptrained, full.uptrained)]
        points += [(r.kv_bytes, r.converted or 0.0, r.uptrained) for r in rows if r.name == method]
        bytes_, before, after = zip(*points, strict=True)
        axes.plot(bytes_, before, "o:", color=color, label=f"{method}, as converted")
        axes.plot(bytes_, after, "o-", color=color, label=f"{method}, after 5% of the tokens")
    axes.set(xscale="log", xlabel="KV bytes per token (bf16)", ylabel="held-out loss (nats per token)")
    axes.set_xticks([r.kv_bytes for r in rows[::2]], [f"{r.kv_bytes:,}" for r in rows[::2]])
    axes.minorticks_off()
    axes.legend()
    axes.figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()
