"""Documents as tokens, shuffled, without end, and resumable at any token.

The stream is a pure function of the data, the tokenizer and the seed. It is read in blocks: a block's documents are
shuffled among themselves, so a position is "this block, that document, so many tokens", a few numbers that a
checkpoint keeps. Every process reads the same stream and takes its share of each step, so the number of processes
changes neither the data nor its order.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_attn_patch.documents.sources import EmptyRecords, take_fields
from hf_attn_patch.errors import TrainingError, one_line

logger = logging.getLogger("hf_attn_patch")

#: documents that are shuffled among themselves, and that are tokenised together
BLOCK = 512
TOGETHER = 32


@dataclass(frozen=True)
class Position:
    """Where to go on reading: after ``offset`` tokens of document ``document`` of a block.

    ``reader`` is the data set's own state at the block's start; None is its beginning.
    """

    epoch: int = 0
    block: int = 0
    reader: Any = None
    document: int = 0
    offset: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Document:
    """Token ids of one record (a second list if records are pairs) and where it stands in the stream."""

    ids: list[int]
    target: list[int] | None
    position: Position
    number: int

    def after(self, offset: int) -> Position:
        """The position after ``offset`` tokens of this document."""
        return replace(self.position, offset=offset)

    @property
    def end(self) -> Position:
        """The position of the next document."""
        return replace(self.position, document=self.position.document + 1, offset=0)


class TokenStream:
    """Endless tokenised documents of a data set, the held-out ones left out (or, for evaluation, alone).

    Args:
        open_data: opens the data set anew (a ``datasets.IterableDataset``).
        tokenizer: of transformers.
        fields: ``("text",)``, or two for pairs.
        name: of the data set, for messages.
        seed: of the shuffle; None keeps the stored order.
        held_out_every: every so many-th document is held out; 0 holds out none.
        held_out: yield the held-out documents once instead of the others for ever.
        add_eos: end each document with the tokenizer's end-of-text token, if it has one.
    """

    def __init__(
        self,
        open_data: Callable[[], Any],
        tokenizer: Any,
        *,
        fields: tuple[str, ...] = ("text",),
        name: str = "the data",
        seed: int | None = 0,
        held_out_every: int = 0,
        held_out: bool = False,
        add_eos: bool = True,
    ) -> None:
        self._warned = False
        self._empty = EmptyRecords(name, fields)
        self.open_data, self.tokenizer, self.fields, self.name = open_data, tokenizer, fields, name
        self.seed, self.held_out_every, self.held_out, self.add_eos = seed, held_out_every, held_out, add_eos

    def documents(self, position: Position | None = None) -> Iterator[Document]:
        """Documents from ``position`` on; the first one without the tokens that were already taken.

        Raises:
            TrainingError: a whole epoch gave nothing.
        """
        start = position or Position()
        while True:
            seen = 0
            for document in self._epoch(start):
                seen += 1
                yield document
            if self.held_out:
                return
            if not seen and start.block == 0 and start.document == 0:
                raise TrainingError(f"{self.name} holds no text to train on")
            start = Position(epoch=start.epoch + 1)

    def _epoch(self, start: Position) -> Iterator[Document]:
        data = self.open_data()
        if start.reader is not None:
            data.load_state_dict(start.reader)
        self._empty = EmptyRecords(self.name, self.fields)
        records = iter(data)
        reader = start.reader
        for block in itertools.count(start.block):
            chunk = self._read(records)
            if not chunk:
                return self._empty.end()
            following = data.state_dict()
            place = Position(start.epoch, block, reader)
            skip = (start.document, start.offset) if block == start.block else (0, 0)
            yield from self._block(chunk, place, *skip)
            reader = following

    def _read(self, records: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            return list(itertools.islice(records, BLOCK))
        except Exception as error:  # of datasets, pyarrow, a network: all mean the same to the user
            reason = one_line(error)
            raise TrainingError(f"{self.name} can't be read to its end ({type(error).__name__}: {reason})") from error

    def _block(self, records: list[dict[str, Any]], place: Position, skip: int, offset: int) -> Iterator[Document]:
        numbers = range(place.block * BLOCK, place.block * BLOCK + len(records))
        kept = [
            (number, take_fields(record, self.fields, self.name))
            for number, record in zip(numbers, records, strict=True)
            if not self.held_out_every or (number % self.held_out_every == self.held_out_every - 1) == self.held_out
        ]
        kept = [(number, texts) for number, texts in kept if self._empty.see(texts)]
        self._look_for_other_encodings(kept)
        if self.seed is not None and not self.held_out:
            random.Random(f"{self.seed} {place.epoch} {place.block}").shuffle(kept)
        for first in range(skip, len(kept), TOGETHER):
            some = kept[first : first + TOGETHER]
            columns = [self._tokenize([texts[i] for _, texts in some]) for i in range(len(self.fields))]
            for index, (number, _) in enumerate(some):
                ids, target = columns[0][index], columns[1][index] if len(columns) > 1 else None
                at = replace(place, document=first + index)
                if at.document == skip and offset:
                    ids, at = ids[offset:], replace(at, offset=offset)
                yield Document(ids, target, at, number)

    def _look_for_other_encodings(self, documents: list[tuple[int, tuple[str, ...]]]) -> None:
        """Warn once of U+FFFD: text files in another encoding than UTF-8 are read, but with that instead of letters."""
        odd = next((number for number, texts in documents if not self._warned and "\ufffd" in "".join(texts)), None)
        if odd is not None:
            self._warned = True
            logger.warning(
                "document %d of %s has U+FFFD in it, which stands for bytes that are not UTF-8; if that is not meant, "
                "convert the file or leave it out with --dataset-glob", odd, self.name,
            )  # fmt: skip

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: a document longer than the model's context is no mistake here, it is cut by the packing
        ids: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        if self.add_eos and eos is not None:
            ids = [one if one and one[-1] == eos else [*one, eos] for one in ids]
        return ids
