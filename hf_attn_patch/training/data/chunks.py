"""Examples of one document each, padded to the longest of a batch: for encoders and sequence-to-sequence models."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.errors import TrainingError
from hf_attn_patch.losses.chunked import IGNORE

from .stream import Position, TokenStream


@dataclass(frozen=True)
class Pair:
    """Token ids in and, for sequence-to-sequence, token ids out.

    Args:
        position: of the stream after this example.
        numbers: the document, twice, for messages.
    """

    source: list[int]
    target: list[int] | None
    position: Position
    numbers: tuple[int, int]

    @property
    def targets(self) -> int:
        return len(self.source if self.target is None else self.target)

    @property
    def lengths(self) -> list[int]:
        return [len(self.source)] if self.target is None else [len(self.source), len(self.target)]


@dataclass
class PaddedBatch:
    """``ids`` and ``mask`` [B, S]; ``labels`` [B, St] with -100 where there is nothing to predict.

    For encoders ``labels`` [B, S] is 0 at every real token: what is compared there are embeddings.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> PaddedBatch:
        return PaddedBatch(self.ids.to(device), self.mask.to(device), self.labels.to(device))


def chunks(stream: TokenStream, S: int, position: Position | None = None) -> Iterator[Pair]:
    """Documents in pieces of at most ``S`` tokens."""
    for document in stream.documents(position):
        rest, taken = document.ids, document.position.offset
        while rest:
            piece, rest = rest[:S], rest[S:]
            taken += len(piece)
            yield Pair(piece, None, document.after(taken) if rest else document.end, (document.number,) * 2)


def given_pairs(stream: TokenStream, S: int, position: Position | None = None) -> Iterator[Pair]:
    """The user's own pairs, each side cut to ``S`` tokens."""
    for document in stream.documents(position):
        assert document.target is not None
        yield Pair(document.ids[:S], document.target[:S], document.end, (document.number,) * 2)


@dataclass(frozen=True)
class Corruption:
    """Span corruption: what is hidden, and how the gaps are written.

    T5 (Raffel et al. 2020, arXiv 1910.10683): each hidden span becomes one sentinel, and the target is sentinel and
    span in turn. BART (Lewis et al. 2020, arXiv 1910.13461): each becomes the mask token, and the target is the whole.

    Args:
        sentinels: T5's, in order of use; empty for BART's way with ``mask``.
    """

    sentinels: tuple[int, ...]
    mask: int | None
    eos: int
    density: float = 0.15
    mean_span: float = 3.0

    @classmethod
    def of(cls, tokenizer: Any) -> Corruption:
        """The way that suits the tokenizer.

        Raises:
            TrainingError: it has neither sentinels nor a mask token.
        """
        known = tokenizer.get_vocab()
        sentinels: list[int] = []
        while f"<extra_id_{len(sentinels)}>" in known:
            sentinels.append(known[f"<extra_id_{len(sentinels)}>"])
        if tokenizer.eos_token_id is None or not (sentinels or tokenizer.mask_token_id is not None):
            raise TrainingError(
                "span corruption needs a tokenizer with an end-of-text token and <extra_id_0> or a mask token; give "
                "pairs with --source-field and --target-field"
            )
        return cls(tuple(sentinels), tokenizer.mask_token_id, tokenizer.eos_token_id)

    def spans(self, length: int, rng: random.Random) -> list[tuple[range, range]]:
        """``length`` positions as (kept, hidden) in turn: random cuts, ``density`` of them hidden.

        >>> c = Corruption((9, 8), None, 1)
        >>> [(list(k), list(h)) for k, h in c.spans(7, random.Random(0))]
        [([0, 1, 2, 3, 4, 5], [6])]
        """
        hidden = min(max(round(length * self.density), 1), length - 1)
        count = max(1, min(round(hidden / self.mean_span), hidden, length - hidden))
        if self.sentinels:
            count = min(count, len(self.sentinels))
        kept_lengths, hidden_lengths = _cut(length - hidden, count, rng), _cut(hidden, count, rng)
        found, at = [], 0
        for keep, hide in zip(kept_lengths, hidden_lengths, strict=True):
            found.append((range(at, at + keep), range(at + keep, at + keep + hide)))
            at += keep + hide
        return found

    def apply(self, ids: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
        """(source, target) of two tokens or more; their own end-of-text token moves to the ends of both."""
        source: list[int] = []
        target: list[int] = []
        for index, (kept, hidden) in enumerate(self.spans(len(ids), rng)):
            gap = self.sentinels[index] if self.sentinels else self.mask
            assert gap is not None
            source += [*ids[kept.start : kept.stop], gap]
            target += [gap, *ids[hidden.start : hidden.stop]]
        return [*source, self.eos], [*(target if self.sentinels else ids), self.eos]


def corrupted(
    stream: TokenStream, S: int, corruption: Corruption, seed: int, position: Position | None = None
) -> Iterator[Pair]:
    """Pieces of documents with hidden spans; which ones depends on the seed, the epoch and the place alone."""
    for piece in chunks(stream, S, position):
        ids = piece.source[:-1] if piece.source[-1] == corruption.eos else piece.source
        if len(ids) < 2:
            continue
        place = piece.position
        rng = random.Random(f"{seed} {place.epoch} {place.block} {place.document} {place.offset}")
        source, target = corruption.apply(ids, rng)
        yield Pair(source, target, piece.position, piece.numbers)


def collate_pairs(pairs: list[Pair], pad: int) -> PaddedBatch:
    """Rows padded on the right to the longest."""
    ids, mask = _rows([p.source for p in pairs], pad)
    if pairs[0].target is None:
        return PaddedBatch(ids, mask, torch.zeros_like(ids).masked_fill(~mask, IGNORE))
    targets, real = _rows([p.target or [] for p in pairs], pad)
    return PaddedBatch(ids, mask, targets.masked_fill(~real, IGNORE))


def _rows(lists: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(one) for one in lists])
    longest = int(lengths.max())
    rows = torch.tensor([one + [pad] * (longest - len(one)) for one in lists])
    return rows, torch.arange(longest) < lengths[:, None]


def _cut(total: int, parts: int, rng: random.Random) -> list[int]:
    """``total`` as a sum of ``parts`` positive numbers, each way as likely."""
    borders = [0, *sorted(rng.sample(range(1, total), parts - 1)), total]
    return [b - a for a, b in itertools.pairwise(borders)]
