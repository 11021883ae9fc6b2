"""Stopping a run between two steps when the machine asks for it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopSignals:
    """Remembers SIGTERM and SIGINT instead of dying in the middle of a step; a second SIGINT interrupts at once.

    >>> import os
    >>> with StopSignals() as stop:
    ...     before = stop.asked
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     before, stop.asked == signal.SIGTERM
    (0, True)
    """

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that Python did not install, and cannot put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
