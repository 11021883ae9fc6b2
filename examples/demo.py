"""The whole story on this machine: train a small multi-head model, convert it, uptrain it, compare.

    python examples/demo.py [--output demo-output] [--size auto|tiny|cpu|gpu] [--kv-heads 2 1]

A Llama with 8 heads learns to write Python from Python's own library. It is converted to 2 and to 1 KV heads, by
averaging heads (the GQA paper's way), by aligning them in a common basis first, and by calibrating on a little text,
and each result is uptrained, distilling from the original. Each method may read 5% of the training's tokens in all:
what calibration reads, uptraining after it does not get. Every stage is a public command, printed before it runs.
Without a GPU this takes six or seven minutes on two cores; with one, a larger model learns from all the Python code
that is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

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
    calibration_tokens: int  # a part of the 5%

    @property
    def allowance(self) -> int:
        """5% of the tokens: what each converted model may read."""
        return self.tokens // 20


SIZES = {
    "tiny": Size(64, 2, 512, 80_000, 128, 8, 8, 3e-3, 4_000, 2_000),
    "cpu": Size(128, 4, 1024, 1_600_000, 256, 4, 4, 5e-3, 20_000, 32_000),
    "gpu": Size(512, 8, 8192, 40_000_000, 1024, 32, 32, 1e-3, 200_000, 500_000),
}
#: the methods that are compared: the paper's, the best one without text, the best one; and by how much the learning
#: rate of their uptraining is below that of the training, for what begins near the original needs smaller steps
METHODS = {"mean": 3, "aligned": 3, "calibrated": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--size", choices=["auto", *SIZES], default="auto")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[2, 1], help=f"to convert to; each divides {HEADS}")
    args = parser.parse_args()
    make_folder(parser, args.output)
    require_kv_heads(parser, args.kv_heads, HEADS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the command that runs as well
    import torch

    name = args.size if args.size != "auto" else "gpu" if torch.cuda.is_available() else "cpu"
    size, out = SIZES[name], args.output
    started = time.monotonic()

    say(f"1. A model with {HEADS} heads, made anew, learns Python from {size.tokens:,} tokens")
    text, held_out = collect_text(out / "python.jsonl", more=name == "gpu"), out / "held-out.jsonl"
    make_model(out / "new", text, size)
    common: dict[str, object] = {
        "sequence-length": size.sequence, "batch-size": size.batch, "micro-batch-size": size.micro, "warmup": 0.1,
        "eval-dataset": held_out, "eval-tokens": size.eval_tokens, "eval-every": 10**9, "checkpoint-every": 0,
    }  # fmt: skip
    run_uptrain(out / "new", out / "mha", text, {**common, "tokens": size.tokens, "lr": size.lr})

    heads = " and ".join(map(str, args.kv_heads))
    say(f"2. Fewer KV heads: {HEADS} become {heads}, by three methods")
    calibrate = ["--calibration-tokens", size.calibration_tokens, "--calibration-length", size.sequence]
    for kv_heads in args.kv_heads:
        for method in METHODS:
            how = ["--calibrate", text, *calibrate] if method == "calibrated" else ["--method", method]
            hf_attn("convert", out / "mha", out / f"{method}-{kv_heads}", "--kv-heads", kv_heads, *how, "--overwrite")

    say(f"3. Uptraining, the original as teacher ({size.allowance:,} tokens, less what calibration has read)")
    for kv_heads in args.kv_heads:
        for method in METHODS:
            source, to = out / f"{method}-{kv_heads}", out / f"{method}-{kv_heads}-uptrained"
            tokens = size.allowance - (size.calibration_tokens if method == "calibrated" else 0)
            run_uptrain(
                source, to, text, {**common, "tokens": tokens, "lr": size.lr / METHODS[method], "teacher": out / "mha"}
            )

    say("4. All of them measured on held-out text")
    names = [f"{m}-{k}{e}" for k in args.kv_heads for m in METHODS for e in ("", "-uptrained")]
    measure = ["--text", held_out, "--source", out / "mha", "--context", size.sequence, "--tokens", size.eval_tokens]
    evaluation = out / "evaluation.json"
    hf_attn("evaluate", *(out / n for n in ("mha", *names)), *measure, "--no-speed", "--json", to=evaluation)

    rows = collect(evaluation, args.kv_heads)
    figure = draw(rows, out / "quality_over_kv_bytes.png")
    say("5. What came of it")
    print(table(rows))
    print(f"\nLoss in nats a token, on {size.eval_tokens:,} held-out tokens. The KV cache is fp32, as the weights are.")
    calibration = size.calibration_tokens
    print(f"5% are {size.allowance:,} tokens; where calibration was used, it has read {calibration:,} of them.")
    if figure:
        print(f"The same as a figure: {figure}")
    print(f"\nAll of this took {(time.monotonic() - started) / 60:.1f} minutes. With a model of your own:\n")
    print("\n".join(f"    {line}" for line in OWN))


#: the README's commands
OWN = (
    "hf-attn convert YOUR_MODEL converted --kv-heads 8 --calibrate YOUR_TEXT",
    "accelerate launch -q examples/uptrain.py --model converted --teacher YOUR_MODEL --dataset YOUR_TEXT"
    " --tokens 50M --output uptrained",
    'AutoModelForCausalLM.from_pretrained("uptrained", attn_implementation="hf_attn_patch")',
)


def make_folder(parser: argparse.ArgumentParser, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {folder} can't be made: {error.strerror}")


def require_kv_heads(parser: argparse.ArgumentParser, wanted: list[int], heads: int) -> None:
    """Before anything is trained, not after."""
    for n in wanted:
        if n < 1 or heads % n:
            parser.error(f"--kv-heads {n}: {heads} heads cannot share {n}; {', '.join(divisors(heads))} would do")


def divisors(n: int) -> list[str]:
    return [str(d) for d in range(1, n + 1) if n % d == 0]


def say(text: str) -> None:
    print(f"\n== {text}\n", flush=True)


def run(command: list[str], shown: list[str], to: Path | None = None) -> None:
    """Print a command as a user would type it, and run it with its progress in sight; its output goes to ``to``."""
    typed = shlex.join(shown) + (f" > {shlex.quote(str(to))}" if to else "")
    print(f"$ {typed}", flush=True)
    quiet = {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}  # everything is here already
    # threads that spin while they wait, for long by default, come to a standstill beside other work on the machine
    patient = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "20000")}
    with to.open("w") if to else contextlib.nullcontext() as file:
        done = subprocess.run(command, env={**os.environ, **quiet, **patient}, check=False, stdout=file)
    if done.returncode:
        sys.exit(f"demo: this failed: {typed}")


def hf_attn(*arguments: object, to: Path | None = None) -> None:
    words = [str(a) for a in arguments]
    run([sys.executable, "-c", "from hf_attn_patch.cli import main; main()", *words], ["hf-attn", *words], to)


def run_uptrain(model: Path, output: Path, text: Path, options: dict[str, object]) -> None:
    """examples/uptrain.py, with ``options`` by their names on the command line."""
    given = {"model": model, "dataset": text, "output": output, "overwrite": "true", **options}
    words = [relative(EXAMPLES / "uptrain.py")] + [part for k, v in given.items() for part in (f"--{k}", str(v))]
    run([sys.executable, *words], ["python", *words])


def relative(path: Path) -> str:
    """As it is typed in the current folder."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def collect_text(path: Path, *, more: bool) -> Path:
    """Python's own library as JSONL, one file a document, in mixed order; a few go to ``held-out.jsonl`` beside it.

    Args:
        more: the installed packages as well (a large model would know the library by heart).
    """
    paths = sysconfig.get_paths()
    others = {"test"} if more else {"site-packages", "dist-packages", "test"}
    folders = [Path(paths["stdlib"]), *([Path(paths["purelib"])] if more else [])]
    below = {p: p.relative_to(folder) for folder in folders for p in folder.rglob("*.py")}
    files = sorted((p for p, b in below.items() if not others & set(b.parts)), key=lambda p: (below[p].as_posix(), p))
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
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(bpe.to_str()), eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
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
    """One line of the table: a method at a number of KV heads, as ``hf-attn evaluate`` found it."""

    method: str
    kv_heads: int
    kv_bytes: int
    converted: float | None
    uptrained: float
    kl: float


def collect(evaluation: Path, kv_heads: list[int]) -> list[Row]:
    """The rows out of ``hf-attn evaluate --json``, the original first."""
    found = {Path(e["model"]).name: e for e in json.loads(evaluation.read_text())}
    full = found["mha"]
    rows = [Row("multi-head", HEADS, full["kv_bytes_per_token"], None, full["loss"], 0.0)]
    for heads in kv_heads:
        for method in METHODS:
            before, after = found[f"{method}-{heads}"], found[f"{method}-{heads}-uptrained"]
            rows.append(Row(method, heads, after["kv_bytes_per_token"], before["loss"], after["loss"], after["kl"]))
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| | KV heads | KV bytes a token | loss as converted | loss after 5% | KL to the original |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        before = f"{row.converted:.3f}" if row.converted is not None else ""
        figures = f"{row.kv_bytes:,} | {before} | {row.uptrained:.3f} | {row.kl:.3f}"
        lines.append(f"| {row.method} | {row.kv_heads} | {figures} |")
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
    for color, method in zip(("tab:orange", "tab:blue", "tab:green"), METHODS, strict=True):
        points = [(full.kv_bytes, full.uptrained, full.uptrained)]
        points += [(r.kv_bytes, r.converted or 0.0, r.uptrained) for r in rows if r.method == method]
        bytes_, before, after = zip(*points, strict=True)
        axes.plot(bytes_, before, "o:", color=color, label=f"{method}, as converted")
        axes.plot(bytes_, after, "o-", color=color, label=f"{method}, after 5% of the tokens")
    axes.set(xscale="log", xlabel="KV bytes per token (fp32)", ylabel="held-out loss (nats per token)")
    ticks = sorted({r.kv_bytes for r in rows})
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.legend()
    axes.figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()
