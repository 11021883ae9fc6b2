"""The code blocks of Markdown pages, and small checkpoints under the names that the pages use."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^\n]+?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    body: str
    why_not_run: str | None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page; ``<!-- not run: REASON -->`` before one keeps it from being run."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, m.start()) + 1, m["language"], textwrap.dedent(m["body"]), m["why"])
        for m in _FENCE.finditer(text)
    ]


def commands(body: str) -> list[list[str]]:
    """The lines of a bash block as arguments, continued lines joined, comments gone."""
    lines = body.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def stand_ins(folder: Path) -> None:
    """Tiny checkpoints at ``folder/<hub id>``, and some text: found by a process whose working directory it is."""
    from tiny import python_sources, save_tiny, tiny_llama
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    for name, source in zip(("text.txt", "held-out.txt"), python_sources(), strict=False):
        (folder / name).write_text(source.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    sizes: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 32, "max_position_embeddings": 512}
    save_tiny(folder / "meta-llama/Llama-2-7b-hf", tiny_llama(kv_heads=32, **sizes))
    torch.manual_seed(0)
    t5 = T5Config(
        vocab_size=512, d_model=64, d_kv=8, d_ff=64, num_layers=2, num_heads=8, decoder_start_token_id=0
    )  # fmt: skip
    save_tiny(folder / "google-t5/t5-small", T5ForConditionalGeneration(t5))
    gpt2 = GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=1)
    save_tiny(folder / "openai-community/gpt2", GPT2LMHeadModel(gpt2))
