"""The GQA paper's Figure 4 in minutes: a T5 trained here on real text, its decoder converted to MQA, uptrained by 5%.

The task is to write a Python function's docstring (its first line) from its code; the functions are those of the
Python installation that runs this. As in the paper (Ainslie et al. 2023, arXiv 2305.13245) the decoder's self- and
cross-attention are converted and the encoder is left as it is; K and V heads are mean-pooled, taken from the first
head, or drawn anew; then the model is trained for 5% of its first training's steps.

    python examples/t5_paper.py --out t5_paper                                          # minutes on two cores
    python examples/t5_paper.py --device cuda --steps 10000 --width 256 --layers 4      # minutes on a GPU

It prints held-out losses and writes results.json and (with matplotlib) figure.png to the folder ``--out``.
"""

from __future__ import annotations

import ast
import json
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

import hf_attn_patch  # noqa: F401 - makes the Auto classes know the grouped T5
from hf_attn_patch.conversion import convert

PAD, END = 0, 1
SOURCE, TARGET = 64, 16  # tokens
METHODS = ("mean", "first", "random")


def definitions(node: ast.AST) -> Iterator[ast.stmt]:
    """Functions and classes in a module, a class or a function (not those under an ``if``: ast.walk is slow)."""
    for child in getattr(node, "body", ()):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield child
            yield from definitions(child)


def installed() -> list[Path]:
    """Where Python code lies: the standard library, and the packages beside transformers."""
    return [Path(sysconfig.get_path("stdlib")), Path(transformers.__file__).parent.parent]


def functions(limit: int, folders: list[Path], seed: int = 0) -> Iterator[tuple[str, str]]:
    """(code without its docstring, the docstring's first paragraph) of functions in the folders' Python files.

    The order does not depend on where the folders lie. Code that holds the paragraph once more is left out: to copy
    it would be to know the answer.
    """
    found = {file.resolve(): file.relative_to(folder) for folder in folders for file in folder.rglob("*.py")}
    files = sorted(file for file, below in found.items() if not {"test", "tests"} & set(below.parts))
    files.sort(key=lambda file: found[file].as_posix())
    random.Random(seed).shuffle(files)
    seen = set()
    for file in files:
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # the library's own examples of broken files
            continue
        for node in definitions(tree):
            if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)) or len(node.body) < 2:
                continue
            node.body = node.body[1:9]  # more than SOURCE tokens, nearly always
            node.decorator_list = []
            line = " ".join(doc.strip().split("\n\n")[0].split())
            code = ast.unparse(node)
            if 10 <= len(line) <= 100 and line not in seen and line not in code:
                seen.add(line)
                yield code, line
                if len(seen) == limit:
                    return


def tokenizer_for(pairs: list[tuple[str, str]], size: int) -> Tokenizer:
    """A byte-level BPE of the training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], length: int) -> Tensor:
    """[N, length], padded."""
    rows = [[*e.ids[: length - 1], END] for e in tokenizer.encode_batch(texts)]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


def loss_of(model: Any, source: Tensor, target: Tensor) -> Tensor:
    """Nats per target token."""
    mask = source != PAD
    labels = target.masked_fill(target == PAD, -100)
    return model(input_ids=source, attention_mask=mask, labels=labels).loss


@torch.no_grad()
def held_out_loss(model: Any, source: Tensor, target: Tensor) -> float:
    model.eval()
    total = tokens = 0.0
    for s, t in zip(source.split(128), target.split(128), strict=True):
        n = int((t != PAD).sum())
        total, tokens = total + float(loss_of(model, s, t)) * n, tokens + n
    return total / tokens


def train(model: Any, source: Tensor, target: Tensor, steps: int, lr: float, seed: int, batch: int) -> None:
    """AdamW with a short warm-up; the learning rate then falls to zero."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, max(0.0, (steps - i) / max(1, steps - warm_up)))
    )
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(source), (batch,), generator=draw).to(source.device)
        loss = loss_of(model, source[rows], target[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 200 == 0 and steps > 200:
            click.echo(f"  step {step}: loss {loss.item():.3f}")


def draw_figure(results: dict[str, Any], path: Path) -> None:
    """Held-out loss after uptraining, a bar for each method, as the paper's Figure 4."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 2.4))
    means = [statistics.mean(results[m]["uptrained"]) for m in METHODS]
    every = [results["mha"], *(loss for m in METHODS for loss in results[m]["uptrained"])]
    low, high = min(every), max(every)
    for i, method in enumerate(METHODS):
        axis.barh(i, means[i], color="#4C72B0", height=0.6)
        axis.plot(results[method]["uptrained"], [i] * len(results[method]["uptrained"]), "k.", markersize=4)
    axis.axvline(results["mha"], color="gray", linestyle="--", label="multi-head, before conversion")
    axis.set_yticks(range(len(METHODS)), [m.capitalize() for m in METHODS])
    axis.invert_yaxis()
    axis.set_xlim(low - 0.2 * (high - low), high + 0.05 * (high - low))
    axis.set_xlabel(
        f"held-out loss, nats a token, after {results['alpha']:.0%} uptraining (less is better)", fontsize=9
    )
    axis.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)  # above the bars
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def converted(src: str, dst: str, kv_heads: int, method: str, seed: int) -> Any:
    """The decoder's two attentions, as in the paper; the encoder stays as it is."""
    convert(src, dst, {"decoder": kv_heads, "cross": kv_heads}, method=method, seed=seed)
    return AutoModelForSeq2SeqLM.from_pretrained(dst, attn_implementation="hf_attn_patch", trust_remote_code=False)


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--out", type=click.Path(path_type=Path), default=Path("t5_paper"), show_default=True)
@click.option("--steps", default=1500, show_default=True, help="Steps of the first training.")
@click.option("--alpha", default=0.05, show_default=True, help="Share of them for uptraining.")
@click.option("--pairs", default=16000, show_default=True, help="Functions to learn from.")
@click.option("--seeds", default=2, show_default=True, help="Runs of each method.")
@click.option("--width", default=64, show_default=True, help="d_model; heads have an eighth of it.")
@click.option("--layers", default=2, show_default=True, help="Layers of the encoder and of the decoder.")
@click.option("--batch", default=32, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--kv-heads", default=1, show_default=True, help="KV heads of the decoder: 1 is MQA, as in the figure.")
def main(
    out: Path,
    steps: int,
    alpha: float,
    pairs: int,
    seeds: int,
    width: int,
    layers: int,
    batch: int,
    device: str,
    kv_heads: int,
) -> None:
    began = time.monotonic()
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    data = list(functions(pairs, installed()))
    held = max(1, len(data) // 20)
    tokenizer = tokenizer_for(data[held:], 2048)
    sources = encode(tokenizer, [code for code, _ in data], SOURCE).to(device)
    targets = encode(tokenizer, [line for _, line in data], TARGET).to(device)
    click.echo(f"{len(data)} functions, {held} of them held out")
    config = T5Config(
        vocab_size=2048, d_model=width, d_kv=width // 8, num_heads=8, d_ff=2 * width, num_layers=layers,
        num_decoder_layers=layers, dropout_rate=0.0, pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).to(device)
    lr = 4e-3 * (64 / width) ** 0.5
    train(model, sources[held:], targets[held:], steps, lr=lr, seed=0, batch=batch)
    test = sources[:held], targets[:held]
    results: dict[str, Any] = {"alpha": alpha, "steps": steps, "mha": held_out_loss(model, *test)}
    click.echo(f"multi-head: held-out loss {results['mha']:.3f} ({time.monotonic() - began:.0f} s)")
    more = max(1, round(alpha * steps))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/mha")
        for method in METHODS:
            result: dict[str, list[float]] = {"converted": [], "uptrained": []}
            for seed in range(seeds):
                student = converted(f"{folder}/mha", f"{folder}/{method}-{seed}", kv_heads, method, seed).to(device)
                result["converted"].append(held_out_loss(student, *test))
                train(student, sources[held:], targets[held:], more, lr=lr / 2, seed=1 + seed, batch=batch)
                result["uptrained"].append(held_out_loss(student, *test))
            results[method] = result
            before, after = (statistics.mean(result[k]) for k in ("converted", "uptrained"))
            click.echo(f"{method:7} {before:.3f} converted, {after:.3f} after {more} more steps")
    results["seconds"] = time.monotonic() - began
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    try:
        draw_figure(results, out / "figure.png")
    except ImportError:
        click.echo("no figure: matplotlib is not installed")
    order = sorted(METHODS, key=lambda m: statistics.mean(results[m]["uptrained"]))
    click.echo(f"best to worst: {', '.join(order)} (the paper: mean, first, random); {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
