"""Progress: our own bars, which are plain lines in a log, and those of the libraries that load models and data."""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

#: seconds until the first line in a log, and from line to line
FIRST, EVERY = 10.0, 30.0

_hidden = contextvars.ContextVar("progress_is_hidden", default=False)


class Lines(tqdm):  # type: ignore[type-arg]
    """A tqdm for what is no terminal: a line of its own every half minute, however long a single step takes.

    Work of less than ten seconds leaves no line. A thread writes, since a bar that waits for the next step says
    nothing while it lasts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._over = threading.Event()
        self._told = False
        super().__init__(*args, **{**kwargs, "mininterval": float("inf"), "delay": float("inf")})
        if not self.disable:
            self._teller = threading.Thread(target=self._tell, name="progress", daemon=True)
            self._teller.start()

    def _tell(self) -> None:
        wait = FIRST
        while not self._over.wait(wait):
            self._line()
            wait = EVERY

    def _line(self) -> None:
        self._told = True
        print(self, file=self.fp, flush=True)

    def __iter__(self) -> Iterator[Any]:
        """Count every step as it ends; tqdm counts when it draws."""
        try:
            for one in self.iterable:
                yield one
                self.update()
        finally:
            self.close()

    def close(self) -> None:
        """End with a last line, if there was one before."""
        if not self.disable and not self._over.is_set():
            self._over.set()
            self._teller.join()
            if self._told:
                self._line()
        super().close()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Nothing: lines are written by the clock."""

    def clear(self, nolock: bool = False) -> None:
        """Nothing: a line stays where it is."""

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Nothing, as :meth:`display`."""


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str = "it",
    total: float | None = None,
    shown: bool = True,
    **options: Any,
) -> Any:
    """A bar of tqdm on stderr: in a terminal or a notebook a bar, elsewhere (a log, a pipe) plain :class:`Lines`.

    Args:
        iterable, total, unit: as of tqdm; without all three what is shown is the time.
        desc: what is done, such as ``calibrating``.
        shown: no bar at all if false, or within :func:`no_progress`.
        options: others of tqdm.
    """
    from tqdm.auto import tqdm as of_place

    options["disable"] = not shown or _hidden.get()
    notebook = any("notebook" in base.__module__ for base in of_place.__mro__)
    kind = of_place if notebook else tqdm if sys.stderr.isatty() else Lines
    if iterable is None and total is None and not notebook:
        options["bar_format"] = "{desc}, {elapsed}"
    elif kind is Lines:
        known = total is not None or hasattr(iterable, "__len__")
        amount = "{n_fmt} of {total_fmt} {unit} ({percentage:.0f}%)" if known else "{n_fmt} {unit}"
        options["bar_format"] = f"{{desc}}: {amount}, {{elapsed}}{', about {remaining} left' * known}{{postfix}}"
    return kind(iterable, desc=desc, unit=unit, total=total, **options)


@contextmanager
def no_progress(hidden: bool = True) -> Iterator[None]:
    """Within, :func:`progress_bar` shows nothing (``hidden`` false: what it showed before)."""
    token = _hidden.set(hidden or _hidden.get())
    try:
        yield
    finally:
        _hidden.reset(token)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within, transformers and datasets (where it is installed) show no bars; after it they do what they did before."""
    from transformers.utils import logging as of_transformers

    try:
        import datasets
    except ImportError:
        datasets = None
    models = of_transformers.is_progress_bar_enabled()
    data = datasets is not None and not datasets.are_progress_bars_disabled()
    of_transformers.disable_progress_bar()
    if data:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if models:
            of_transformers.enable_progress_bar()
        if data:
            datasets.enable_progress_bars()
