"""The command line as a whole: what it offers, how it answers mistakes, how fast it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner

from hf_attn_patch.cli import main
from hf_attn_patch.cli.main import COMMANDS, EXAMPLES, LazyGroup, terminated


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments), prog_name="hf-attn")
    return result.exit_code, result.output


def test_help_lists_every_command_once_under_a_section() -> None:
    code, text = run("--help")
    assert code == 0
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.split()[0] in COMMANDS]
    assert sorted(listed) == sorted(COMMANDS)
    assert "Exit codes" in text


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from hf_attn_patch.cli import main; main(['--help'], standalone_mode=False); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_ends_with_examples_that_parse(name: str) -> None:
    code, text = run(name, "--help")
    assert code == 0
    group = main
    assert isinstance(group, LazyGroup)
    command = group.get_command(click.Context(group), name)
    assert command is not None
    for example in EXAMPLES.get(name, ()):
        assert example in text
        program, own, *arguments = example.split(" > ")[0].split()
        assert (program, own) == ("hf-attn", name)
        command.make_context(name, arguments)  # raises for a flag that does not exist


def test_a_wrong_command_names_the_right_one() -> None:
    code, text = run("convret", "a", "b")
    assert code == 2
    assert "'convert'?" in text


def test_a_command_like_no_other_gets_the_list() -> None:
    code, text = run("xyzzy")
    assert code == 2
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("target", "arguments", "text"),
    [
        ("hf_attn_patch.cli.env.environment", ["env"], "Interrupted.\n"),
        (
            "hf_attn_patch.conversion.api.plan",
            ["convert", "a", "b", "--kv-heads", "2"],
            "Interrupted; the conversion goes on where it stopped with --resume.\n",
        ),
    ],
)
def test_control_c(target: str, arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(target, interrupted)
    assert run(*arguments) == (130, text)


def test_a_request_to_end_is_told_as_control_c_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Slurm and Kubernetes send it; a program that hears it in its own way is left to."""

    def asked(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("hf_attn_patch.conversion.api.plan", asked)
    text = "Interrupted; the conversion goes on where it stopped with --resume.\n"
    assert run("convert", "a", "b", "--kv-heads", "2") == (143, text)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with terminated():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert heard == [signal.SIGTERM]


def test_a_wrong_flag_names_the_right_one() -> None:
    code, text = run("convert", "a", "b", "--kv-head", "8")
    assert code == 2
    assert "--kv-heads" in text.splitlines()[-1]


@pytest.mark.parametrize("arguments", [("inspect", "no/such/folder/here"), ("convert", "x", "y", "--kv-heads", "many")])
def test_an_error_of_input_is_one_sentence_without_a_traceback_or_colours(arguments: tuple[str, ...]) -> None:
    code, text = run(*arguments)
    assert code == 2
    assert len(text.strip().splitlines()) == 1
    assert text.startswith("Error: ")
    assert "\x1b[" not in text
