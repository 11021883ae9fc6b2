"""Full sequences out of documents of any length: no padding, and borders that attention respects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn_patch.errors import TrainingError
from hf_attn_patch.losses.chunked import IGNORE

from .stream import Position, TokenStream


@dataclass(frozen=True)
class PackedSequence:
    """One full sequence of S tokens: some documents, or parts of them, one after the other.

    Args:
        ids: S token ids.
        labels: S ids, the token that follows each in its document; -100 after a document's last token. Where a
            document goes on in the next sequence its cut costs no label.
        lengths: of the documents' parts, summing to S.
        position: of the stream after this sequence.
        numbers: the first and last document in it, for messages.
    """

    ids: list[int]
    labels: list[int]
    lengths: list[int]
    position: Position
    numbers: tuple[int, int]

    @property
    def targets(self) -> int:
        """How many tokens have a label."""
        return sum(label != IGNORE for label in self.labels)


def pack(stream: TokenStream, S: int, position: Position | None = None) -> Iterator[PackedSequence]:
    """Sequences of exactly ``S`` tokens; a document that does not fit goes on in the next one.

    A document's continuation starts at position 0 again and sees only itself.

    Raises:
        TrainingError: the whole data do not fill one sequence.
    """
    last = (position or Position()).epoch
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    first = -1
    for document in stream.documents(position):
        if document.position.epoch > last + 1:
            raise TrainingError(f"{stream.name} is shorter than one sequence of {S} tokens; lower --sequence-length")
        rest, taken = document.ids, document.position.offset
        while len(rest) > 1:  # a single token predicts nothing
            part = rest[: S - len(ids)]
            following = rest[len(part)] if len(part) < len(rest) else IGNORE
            first = document.number if not ids else first
            ids += part
            labels += [*part[1:], following]
            lengths.append(len(part))
            taken += len(part)
            # what is left of one token has been a label already and would predict nothing
            rest = rest[len(part) :]
            if len(ids) == S:
                after = document.after(taken) if len(rest) > 1 else document.end
                yield PackedSequence(ids, labels, lengths, after, (first, document.number))
                last = document.position.epoch
                ids, labels, lengths = [], [], []


@dataclass
class PackedBatch:
    """N sequences in one row of T = N * S tokens.

    ``ids``, ``labels`` and ``positions`` are [1, T]; ``cu_seqlens`` is [documents + 1], int32; ``longest`` is the
    longest document.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    longest: int

    def to(self, device: torch.device) -> PackedBatch:
        ids, labels, positions, cu_seqlens = (
            t.to(device, non_blocking=True) for t in (self.ids, self.labels, self.positions, self.cu_seqlens)
        )
        return PackedBatch(ids, labels, positions, cu_seqlens, self.longest)


def collate(sequences: list[PackedSequence]) -> PackedBatch:
    """Sequences side by side in one row, so that a batch of any size is one packed call."""
    lengths = [n for sequence in sequences for n in sequence.lengths]
    return PackedBatch(
        ids=torch.tensor([[i for s in sequences for i in s.ids]]),
        labels=torch.tensor([[i for s in sequences for i in s.labels]]),
        positions=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        longest=max(lengths),
    )
