"""Marks a test as a row of docs/works-with.md (`python docs/works_with.py` runs those tests and writes the page)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class Row(NamedTuple):
    """What the test shows, and the line that a user writes."""

    package: str
    what: str
    line: str


def works_with(package: str, what: str, line: str) -> Callable[[Function], Function]:
    def mark(function: Function) -> Function:
        function.works_with = Row(package, what, line)  # type: ignore[attr-defined]
        return function

    return mark
