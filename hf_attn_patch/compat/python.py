"""Private names of Python's own library."""

from __future__ import annotations

import multiprocessing
from argparse import Action, ArgumentParser
from concurrent.futures import ProcessPoolExecutor

from .ground import known


@known("python", "where argparse keeps a parser's options (ArgumentParser._actions)")
def actions_of(parser: ArgumentParser) -> list[Action]:
    """The options of a parser, those that others added too.

    >>> parser = ArgumentParser(add_help=False)
    >>> _ = parser.add_argument("--name")
    >>> [action.dest for action in actions_of(parser)]
    ['name']
    """
    return parser._actions


@known("python", "how multiprocessing counts processes (Process._identity)")
def process_number() -> int:
    """Which of its parent's children this process is, from 0 on; 0 in the first process of all."""
    identity: tuple[int, ...] = multiprocessing.current_process()._identity  # type: ignore[attr-defined]
    return identity[-1] - 1 if identity else 0


@known("python", "where a ProcessPoolExecutor keeps its processes (_processes)")
def stop_workers(pool: ProcessPoolExecutor) -> None:
    """Stop the processes of a pool in the middle of their work (Python 3.14 has a method of its own for it)."""
    for process in list((pool._processes or {}).values()):
        process.terminate()
