"""What a user, the disk or a lack of memory caused: one sentence on stderr and exit code 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import click

from hf_attn_patch.documents.bars import no_progress
from hf_attn_patch.documents.paths import user_path
from hf_attn_patch.errors import ConversionError, HFAttnError


def user_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """One sentence on stderr and exit code 2 for what a user can cause."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            for name, value in kwargs.items():  # an unset shell variable between quotes
                if value == "" or (isinstance(value, tuple) and "" in value):
                    flag = name.upper() if name in ("src", "dst", "models") else "--" + name.replace("_", "-")
                    raise ConversionError(f"{flag} is empty; is a variable unset?")
            if kwargs.get("picture"):
                check_picture(kwargs["picture"])
            with no_progress(kwargs.get("quiet", False)):
                return function(*args, **kwargs)
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None:
                raise
            click.echo(f"Error: {printable(sentence)}", err=True)
            sys.exit(2)

    return wrapper


def sentence_of(error: Exception) -> str | None:
    """What to tell of an error that a user, the disk or a lack of memory caused; None for a fault of ours.

    >>> sentence_of(FileNotFoundError(2, "No such file or directory", "a.png"))
    'a.png cannot be used: No such file or directory'
    >>> sentence_of(KeyError("x"))
    """
    if isinstance(error, HFAttnError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'} cannot be used: {error.strerror}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        where = "this machine" if isinstance(error, MemoryError) else "the GPU"
        return (
            f"{where} has not enough memory for this; what helps: fewer tokens at a time (--context, "
            "--calibration-length), --device cpu, or no other program beside it"
        )
    return None


def printable(text: str) -> str:
    """One line that a terminal shows as it is, whatever a file's names hold.

    >>> print(printable("no tensor \\x1b[2J\\n in x"))
    no tensor \\x1b[2J in x
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def check_picture(name: str) -> None:
    """What is known of ``--plot`` before any work is done: that its folder is there."""
    folder = user_path(name).parent
    if not folder.is_dir():
        raise ConversionError(f"--plot {name}: there is no folder {folder}")
