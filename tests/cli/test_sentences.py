"""What ends in a sentence on the command line, and what must not."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from hf_attn_patch import AttentionError
from hf_attn_patch.cli.errors import user_errors


def told(error: BaseException) -> tuple[int, str]:
    @click.command()
    @user_errors
    def command() -> None:
        raise error

    done = CliRunner().invoke(command, [])
    return done.exit_code, done.stderr if isinstance(done.exception, SystemExit) else repr(done.exception)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AttentionError("this backend cannot"), "Error: this backend cannot\n"),
        (PermissionError(13, "Permission denied", "/x/a.png"), "Error: /x/a.png cannot be used: Permission denied\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), "Error: the GPU has not enough memory for this; what helps: "),
        (MemoryError(), "Error: this machine has not enough memory for this; what helps: "),
        (AttentionError("a\x1b[2Jb\nc\u202ed"), "Error: a\\x1b[2Jb c\\u202ed\n"),
    ],
)
def test_told_in_one_line(error: BaseException, words: str) -> None:
    code, text = told(error)
    assert (code, text.count("\n")) == (2, 1)
    assert text.startswith(words)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a bug"), AssertionError("a bug")])
def test_faults_of_ours_are_not_hidden(error: Exception) -> None:
    assert told(error) == (1, repr(error))


@pytest.mark.parametrize("name", ["n" * 300, "loop", "~nobody-of-that-name/x/../../loop"])
def test_places_that_cannot_be_looked_at(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refusals import run

    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    (tmp_path / "~nobody-of-that-name" / "x").mkdir(parents=True)
    convert = "convert", name, "dst", "--kv-heads", "2"
    for command in (convert, (*convert, "--dequantize"), ("inspect", name), ("verify", "src", name)):
        done = run(*command)
        assert done.exit_code == 2 and "cannot be used: " in done.stderr, done.output


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("convert", "~nobody/x", "dst", "--kv-heads", "2", "--dequantize"), "~nobody/x is no folder"),
        (("inspect", "src", "--register", "~nobody/rows.py"), "--register ~nobody/rows.py: there is no such file"),
    ],
)
def test_homes_of_nobody(command: tuple[str, ...], words: str) -> None:
    from refusals import run

    done = run(*command)
    assert (done.exit_code, done.stderr) == (2, f"Error: {words}\n")


def test_many_calibration_texts_are_no_long_path() -> None:
    from hf_attn_patch.conversion.calibration.gather import parse_sources

    names = [f"text-{number}.txt" for number in range(100)]
    assert [name for name, _ in parse_sources(",".join(names))] == names
