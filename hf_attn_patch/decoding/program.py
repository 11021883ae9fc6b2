"""The operators of a tape, to be run again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .tape import NONE, Op, Tape


class Program:
    """The operators of a tape, to be run again.

    Args:
        ops: in order.
        values: the tape's.
        results: slots that are returned.
    """

    def __init__(self, ops: Sequence[Op], tape: Tape, results: Sequence[int]) -> None:
        made = {slot for op in ops for slot in op.outputs} - tape.given
        self.ops = _needed(ops, set(results))
        self.results = list(results)
        self.first: list[Tensor | None] = [None if i in made else value for i, value in enumerate(tape.values)]
        self._keep_given()
        last = {slot: i for i, op in enumerate(self.ops) for slot in (*op.inputs, *op.outputs)}
        kept = set(results) | tape.given
        self.over: list[list[int]] = [[] for _ in self.ops]  # the slots that nobody needs after an operator
        for slot, i in last.items():
            if slot != NONE and slot not in kept:
                self.over[i].append(slot)

    def on(self, tensors: dict[int, Tensor | None]) -> Program:
        """The same with other tensors in some slots."""
        other = copy.copy(self)
        other.first = [tensors.get(slot, value) for slot, value in enumerate(self.first)]
        return other

    def _keep_given(self) -> None:
        used = {slot for op in self.ops for slot in op.inputs} | set(self.results)
        self.first = [value if i in used else None for i, value in enumerate(self.first)]

    def run(self) -> list[Tensor]:
        """Run all; the results."""
        values: list[Any] = list(self.first)
        for op, over in zip(self.ops, self.over, strict=True):
            for slot, value in zip(op.outputs, op(values), strict=True):
                if slot != NONE:
                    values[slot] = value
            for slot in over:
                values[slot] = None
        return [values[slot] for slot in self.results]


def _needed(ops: Sequence[Op], wanted: set[int]) -> list[Op]:
    """The operators without those whose results nobody reads."""
    kept: list[Op] = []
    for op in reversed(ops):
        if op.nature.mutates or op.nature.draws or op.nature.meets or not wanted.isdisjoint(op.outputs):
            kept.append(op)
            wanted.update(op.inputs)
    return kept[::-1]
