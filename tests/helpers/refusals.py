"""What is refused is refused cleanly: exit code 2, one sentence, nothing left behind; and how inputs get spoilt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from hf_attn_patch.cli import main

K0 = "model.layers.0.self_attn.k_proj.weight"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(folder: Path, *arguments: object, words: str) -> None:
    """The command fails as it should and leaves ``folder`` as it was."""
    before = listing(folder)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert words in lines[0], lines[0]
    assert "Traceback" not in result.stderr
    assert listing(folder) == before


def convert(src: Path, *more: object, words: str) -> None:
    refused(src.parent, "convert", src, src.parent / "dst", "--kv-heads", 2, *more, words=words)


def change_config(src: Path, **changes: Any) -> None:
    config = json.loads((src / "config.json").read_text())
    config.update(changes)
    (src / "config.json").write_text(json.dumps(config))


def change_tensors(src: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(src / "model.safetensors")
    change(tensors)
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
