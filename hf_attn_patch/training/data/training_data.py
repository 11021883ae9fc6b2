"""A run's data: training steps from any position on, and the held-out examples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hf_attn_patch.documents.sources import open_documents
from hf_attn_patch.errors import TrainingError
from hf_attn_patch.training.options import UptrainOptions

from .chunks import Corruption, PaddedBatch, Pair, chunks, collate_pairs, corrupted, given_pairs
from .packing import collate, pack
from .steps import TrainingStep, steps
from .stream import Position, TokenStream


@dataclass(frozen=True)
class Framing:
    """How documents become examples of a fixed size, and examples a batch."""

    examples: Callable[[TokenStream, Position | None], Iterator[Any]]
    collate: Callable[[list[Any]], Any]


def framing_for(kind: str, options: UptrainOptions, tokenizer: Any) -> Framing:
    """How a causal, seq2seq or encoder model is fed."""
    S = options.sequence_length
    if kind == "causal":
        return Framing(lambda stream, position: pack(stream, S, position), collate)
    pad = tokenizer.pad_token_id or 0

    def together(pairs: list[Pair]) -> PaddedBatch:
        return collate_pairs(pairs, pad)

    if kind == "encoder":
        return Framing(lambda stream, position: chunks(stream, S, position), together)
    if options.source_field:
        return Framing(lambda stream, position: given_pairs(stream, S, position), together)
    corruption = Corruption.of(tokenizer)
    return Framing(lambda stream, position: corrupted(stream, S, corruption, options.seed, position), together)


class TrainingData:
    """What ``options`` say about data, opened with ``tokenizer``."""

    def __init__(self, options: UptrainOptions, tokenizer: Any, framing: Framing) -> None:
        self.options, self.tokenizer, self.framing = options, tokenizer, framing
        pair = (options.source_field, options.target_field)
        self.fields = (pair[0], pair[1]) if pair[0] and pair[1] else (options.text_field,)

    def _stream(self, name: str, *, held_out_every: int, held_out: bool) -> TokenStream:
        o = self.options
        return TokenStream(
            lambda: open_documents(
                name, fields=self.fields, config=o.dataset_config, split=o.dataset_split, pattern=o.dataset_glob,
                unit=o.text_unit,
            ),
            self.tokenizer, fields=self.fields, name=name, seed=o.seed if o.shuffle else None,
            held_out_every=held_out_every, held_out=held_out,
        )  # fmt: skip

    @property
    def _holds_out(self) -> int:
        wanted = self.options.eval_tokens and self.options.eval_dataset is None
        return self.options.held_out_every if wanted else 0

    def steps(self, position: Position, process: int, processes: int) -> Iterator[TrainingStep[Any]]:
        """Optimiser steps from ``position`` on, without end.

        Raises:
            TrainingError: the data do not fill even one step.
        """
        o = self.options
        stream = self._stream(o.dataset, held_out_every=self._holds_out, held_out=False)
        found = steps(
            self.framing.examples(stream, position), batch_size=o.batch_size, micro_batch_size=o.micro_batch_size,
            process=process, processes=processes,
        )  # fmt: skip
        for index, step in enumerate(found):
            if index == 0 and position == Position() and step.position.epoch:
                raise TrainingError(
                    f"{o.dataset} is too short: it does not fill one step of {o.batch_size} sequences of "
                    f"{o.sequence_length} tokens; give more text, or lower --batch-size or --sequence-length"
                )
            yield step

    def held_out(self) -> list[Any]:
        """The examples to evaluate on, the same at every evaluation; empty if there shall be none.

        Raises:
            TrainingError: there is too little held-out text for one example.
        """
        o = self.options
        if not o.eval_tokens or (o.eval_dataset is None and not o.held_out_every):
            return []
        if o.eval_dataset is not None:
            # every document of the data set is held out
            stream = self._stream(o.eval_dataset, held_out_every=1, held_out=True)
        else:
            stream = self._stream(o.dataset, held_out_every=o.held_out_every, held_out=True)
        wanted = max(1, o.eval_tokens // o.sequence_length)
        examples = list(itertools.islice(self.framing.examples(stream, None), wanted))
        if not examples:
            if o.eval_dataset is None:  # what is wrong with the documents themselves is said first
                next(self.steps(Position(), 0, 1))
            way = "give --eval-dataset or a smaller --held-out-every" if o.eval_dataset is None else "give a longer one"
            raise TrainingError(
                f"{stream.name} has less held-out text than one sequence of {o.sequence_length} tokens; {way}, or "
                "--eval-tokens 0 to go without evaluation"
            )
        return examples
