"""The code blocks of README.md and docs/ are run, page by page, in order, on tiny stand-ins for hub models."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from doc_blocks import PAGES, ROOT, Block, blocks, commands, stand_ins

from hf_attn_patch.cli import main
from hf_attn_patch.conversion.families import table as families

#: first words of commands that only name a file here, because they install, train or start a server
NOT_RUN = {"pip", "make", "git", "cd", "docker"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-ins")
    stand_ins(folder)
    return folder


@pytest.fixture
def scene(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A working directory with the stand-ins, and what a page's Python blocks share."""
    for name in checkpoints.iterdir():
        (tmp_path / name.name).symlink_to(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES])  # a page shows how to add one
    return {"path": "meta-llama/Llama-2-7b-hf"}  # README.md calls a model's place so


def run_bash(block: Block) -> None:
    for words in commands(block.body):
        where = f"{block.page.name}, line {block.line}: {' '.join(words)}"
        if words[0] == "hf-attn":
            if words[1] == "convert" and len(words) > 3 and Path(words[3]).is_dir():
                shutil.rmtree(words[3])  # a page may show the same conversion twice
            result = CliRunner().invoke(main, words[1:], prog_name="hf-attn")
            assert result.exit_code == 0, f"{where}\n{result.output}\n{result.exception!r}"
        elif words[:2] == ["accelerate", "launch"]:
            check_launch(words[2:], where)
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), where
        else:
            assert words[0] in NOT_RUN, where


def check_launch(words: list[str], where: str) -> None:
    """The script and its settings are there, and the script's options are known. (Training has tests of its own.)"""
    from hf_attn_patch.training import parse_options

    if words[0] == "-q":
        words = words[1:]
    if words[0] == "--config_file":
        assert (ROOT / words[1]).is_file(), where
        words = words[2:]
    script, *options = words
    assert script == "examples/uptrain.py", where
    assert (ROOT / script).is_file(), where
    parse_options(options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page: Path, scene: dict[str, Any]) -> None:
    import torch

    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__page__", **scene}
    for block in blocks(page):
        if block.why_not_run is not None:
            continue
        if block.language in ("python", "py"):
            # as if the page were a file, so that an error names its line
            code = compile("\n" * block.line + block.body, str(page), "exec")
            exec(code, namespace)
        elif block.language in ("bash", "sh", "console"):
            run_bash(block)
        else:
            assert block.language in ("text", "yaml", "json", "toml"), f"{page.name}, line {block.line}"


def literals() -> set[str]:
    """Every piece of text in the source, f-strings in their pieces, implicit concatenation undone."""
    found = set()
    for folder in ("hf_attn_patch", "modeling", "conversion"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_troubleshooting_names_real_messages() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    headings = [line for line in text.splitlines() if line.startswith("### `")]
    assert len(headings) > 15
    known = literals()
    unknown = [h for h in headings if not any(h.removeprefix("### ").strip("`") in message for message in known)]
    assert unknown == []


def test_links_to_files_of_the_repository() -> None:
    """mkdocs checks the links between pages; README.md is not one of them."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_figures_are_those_that_the_code_draws(tmp_path: Path) -> None:
    from scripts import load_script

    draw = load_script("docs/figures/draw.py")
    draw.main(tmp_path)
    made = {path.name for path in tmp_path.glob("*.svg")}
    assert made == {path.name for path in (ROOT / "docs/figures").glob("*.svg")}
    for name in made:  # the words and the colours; coordinates may differ by a font's width
        words = [
            sorted(set(re.findall(r">([^<>\n]+)</text>|(#[0-9a-f]{6})", (folder / name).read_text())))
            for folder in (tmp_path, ROOT / "docs/figures")
        ]
        assert words[0] == words[1], f"{name}: python docs/figures/draw.py"
