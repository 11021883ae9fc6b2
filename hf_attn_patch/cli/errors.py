"""What a user, the disk or a lack of memory caused: one sentence on stderr and exit code 2."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import click

from hf_attn_patch.documents.bars import no_progress
from hf_attn_patch.documents.paths import user_path
from hf_attn_patch.errors import ConversionError, sentence_of


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
            _end(error, printable(sentence))

    return wrapper


def _end(error: Exception, sentence: str) -> NoReturn:
    """Say it and end with code 2; of several processes that know of it, the main one says it, or the launcher."""
    told = False
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from hf_attn_patch.conversion.processes import AgreedError
        from hf_attn_patch.training.loop.launcher import told_to_launcher

        left = told_to_launcher(sentence) != sentence
        told = left or (isinstance(error, AgreedError) and os.environ.get("RANK", "0") != "0")
        if told and not left:
            time.sleep(1)  # a launcher ends them all as soon as one has ended
    if not told:
        click.echo(f"Error: {sentence}", err=True)
    sys.exit(2)


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
