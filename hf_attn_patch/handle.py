"""What a switch gives back, and how it is switched off again: once, in any order.

Whoever switches something on gets a :class:`Handle` of their own. Those who share one switch (two blocks that override
the same name, say) are counted, and the last one to let go puts back what was there before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Self = TypeVar("Self", bound="Handle")
T = TypeVar("T")


class Handle:
    """Undoes what was switched on: called, by :meth:`undo`, or at the end of a ``with`` block.

    Undoing is idempotent, and handles may be undone in any order. A handle that is dropped undoes nothing: what was
    switched on without keeping it is meant to stay.

    Args:
        undo: called once.

    >>> handle = Handle(lambda: print("undone"))
    >>> with handle:
    ...     print("inside")
    inside
    undone
    >>> handle()
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        self._left = [undo]  # popped by whoever comes first; no lock, which a copy of a model could not take along
        self._entered = 0

    def undo(self) -> None:
        """Put things back, if that was not done yet."""
        try:
            undo = self._left.pop()
        except IndexError:
            return
        undo()

    def __call__(self) -> None:
        self.undo()

    def __enter__(self: Self) -> Self:
        if not self._left:
            raise RuntimeError("this handle was undone before, and its block would change nothing: make a new one")
        self._entered += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._entered -= 1
        if not self._entered:
            self.undo()


class Asked:
    """Who asked for a switch and with what setting; of several the last one counts.

    It lies in a model together with what it switches, so that copies and pickles of the model take it along.
    """

    def __init__(self) -> None:
        self.settings: dict[Any, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.settings)

    def ask(self, owner: Any, setting: Any) -> None:
        self.settings.pop(owner, None)
        self.settings[owner] = setting

    def withdraw(self, owner: Any) -> None:
        self.settings.pop(owner, None)

    @property
    def setting(self) -> Any:
        return next(reversed(self.settings.values()))


def of_each(objects: list[T], undo: Callable[[T], None]) -> Handle:
    """A handle that undoes something in each of ``objects``, and keeps none of them alive."""
    kept = [weakref.ref(one) for one in objects]

    def undo_all() -> None:
        for reference in kept:
            if (one := reference()) is not None:
                undo(one)

    return Handle(undo_all)
