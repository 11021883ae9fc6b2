"""What an engine said beside what transformers says: pure functions, and the verdict on one row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Steps = Sequence[Sequence[Mapping[int, float]]]


class Row(NamedTuple):
    """One family asked in one way."""

    engine: str
    family: str
    way: str
    version: str
    date: str
    #: largest difference of a log probability among the likeliest tokens of each step; NaN: not comparable
    difference: float
    #: the same for transformers with its KV heads exchanged: what a wrong engine would show
    exchanged: float
    tokens: int
    #: empty: as it should be
    fault: str
    #: a sentence, where the engine does not take the family
    refused: str = ""


def read_steps(steps: Any) -> list[list[dict[int, float]]]:
    """JSON's string keys back to token ids."""
    return [[{int(i): float(v) for i, v in step.items()} for step in row] for row in steps]


def difference(want: Steps, got: Steps) -> float:
    """Largest absolute difference over the tokens of ``want``; infinite if ``got`` says nothing of one of them."""
    if [len(row) for row in want] != [len(row) for row in got]:
        return math.inf
    pairs = zip([s for row in want for s in row], [s for row in got for s in row], strict=True)
    return max((abs(value - step.get(i, math.inf)) for asked, step in pairs for i, value in asked.items()), default=0.0)


def fault(want: Mapping[str, Any], got: Mapping[str, Any], tolerance: float) -> tuple[float, str]:
    """The difference, and what is wrong in a sentence.

    Args:
        want: ``tokens`` [prompts, steps], ``logprobs`` (per step: token -> log probability), ``margin``, ``exchanged``.
        got: ``tokens`` and ``logprobs`` of the engine.
        tolerance: of a log probability. A check that exchanged KV heads would pass is a fault by itself.
    """
    wanted, said = [list(row) for row in want["tokens"]], [list(row) for row in got["tokens"]]
    apart = difference(want["logprobs"], got["logprobs"])
    if want["exchanged"] < 10 * tolerance:
        return apart, f"exchanged KV heads change a log probability by {want['exchanged']:.2g} only: the check is blind"
    if wanted != said:
        row, step = (
            next(
                (i, j)
                for i, (a, b) in enumerate(zip(wanted, said, strict=False))
                for j in range(len(a))
                if a[: j + 1] != b[: j + 1]
            )
            if len(wanted) == len(said)
            else (len(said), 0)
        )
        return apart, f"other tokens than transformers from prompt {row}, step {step} on"
    if not apart <= tolerance:
        return apart, f"log probabilities differ by {apart:.2g}, more than {tolerance:.2g}"
    return apart, ""


def table(rows: Sequence[Row]) -> str:
    """As Markdown: a line for each engine, family and way."""
    head = ["Engine", "Family", "Asked", "Greedy tokens", "Log probabilities, largest difference", "Heads exchanged"]
    lines = [head, ["---"] * len(head)]
    for r in rows:
        if r.refused:
            lines.append([r.version, r.family, r.way, f"not taken: {r.refused}", "", ""])
        else:
            said = r.fault or f"the same {r.tokens}"
            lines.append([r.version, r.family, r.way, said, f"{r.difference:.1e}", f"{r.exchanged:.1f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
