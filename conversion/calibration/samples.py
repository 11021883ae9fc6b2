"""What a model is calibrated on, as its sides read it: ids, log-mel features or pixels.

Shapes: N samples, S positions of what a side reads (T of a decoder beside an encoder).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: a label that stands for none
IGNORE = -100


@dataclass
class Samples:
    """Calibration samples.

    Attributes:
        inputs: for each side of the model, in order, what it reads, [N, ...]: ids [N, S] int64, or floating point.
        about: what to record of them; ``notes``: what to tell the user.
        kept: where a decoder's tokens are more than padding, [N, T] bool; None: everywhere.
        labels: the word that follows each of a decoder's tokens, [N, T], or :data:`IGNORE`.
        memory: the original encoder's output for all samples [N, S', E], where that is known already.
    """

    inputs: list[Tensor]
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    kept: Tensor | None = None
    labels: Tensor | None = None
    memory: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def only(self, rows: Tensor) -> Samples:
        """The samples of ``rows`` (a mask or numbers)."""
        more = [None if x is None else x[rows] for x in (self.kept, self.labels, self.memory)]
        return Samples([x[rows] for x in self.inputs], self.about, self.notes, *more)


def ended(rows: Sequence[Sequence[int]], length: int, prefix: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decoders' inputs out of whole sequences of unequal length.

    Args:
        rows: each the tokens that a decoder starts with, what it says, and ``end`` if it comes to one.
        length: T, at most.
        prefix: how many tokens of each are given, so that nothing is to be learned from saying them.

    Returns:
        ids [N, T] filled up with ``end``; where they are more than that [N, T]; labels [N, T].

    >>> ids, kept, labels = ended([[1, 2, 5, 9], [1, 2, 9]], 8, 2, end=9)
    >>> ids.tolist(), kept.tolist(), labels.tolist()
    ([[1, 2, 5], [1, 2, 9]], [[True, True, True], [True, True, False]], [[-100, 5, 9], [-100, 9, -100]])
    """
    cut = [list(row[: length + 1]) for row in rows]
    T = max(2, *(len(row) for row in cut)) - 1
    ids = torch.full((len(cut), T), end, dtype=torch.int64)
    labels = torch.full((len(cut), T), IGNORE, dtype=torch.int64)
    kept = torch.zeros(len(cut), T, dtype=torch.bool)
    for i, row in enumerate(cut):
        n = len(row) - 1
        ids[i, : min(T, len(row))] = torch.tensor(row[:T])
        labels[i, prefix - 1 : n] = torch.tensor(row[prefix:])
        kept[i, :n] = True
    return ids, kept, labels
