"""Optimiser steps: which sequences, in which micro-batch, on which process; made ahead in a thread."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from hf_attn_patch.errors import TrainingError

from .stream import Position


class Example(Protocol):
    """What a stream of training examples yields (``PackedSequence``, ``Pair``, ...)."""

    @property
    def targets(self) -> int: ...
    @property
    def position(self) -> Position: ...
    @property
    def lengths(self) -> list[int]: ...
    @property
    def numbers(self) -> tuple[int, int]: ...


E = TypeVar("E", bound=Example)
T = TypeVar("T")


@dataclass(frozen=True)
class TrainingStep(Generic[E]):
    """One optimiser step as one process sees it.

    Args:
        micro: this process's micro-batches, each a list of examples.
        targets: labels in the whole step, over all processes: the loss is divided by it, so neither the number of
            processes nor that of micro-batches changes the gradient.
        tokens: real ones in the whole step, over all processes; padding is none.
        position: of the stream after the step.
        numbers: for messages, ``numbers[process][micro]``: the first and last document of that micro-batch.
    """

    micro: list[list[E]]
    targets: int
    tokens: int
    position: Position
    numbers: list[list[tuple[int, int]]]


def steps(
    examples: Iterator[E], *, batch_size: int, micro_batch_size: int, process: int = 0, processes: int = 1
) -> Iterator[TrainingStep[E]]:
    """Cut a stream of examples into steps of ``batch_size``, the same ones whatever the number of processes.

    Raises:
        TrainingError: ``batch_size`` is not a multiple of ``micro_batch_size * processes``.
    """
    share = batch_size // micro_batches(batch_size, micro_batch_size, processes)
    while whole := list(itertools.islice(examples, batch_size)):
        if len(whole) < batch_size:
            return
        parts = [
            [whole[i + p * micro_batch_size :][:micro_batch_size] for i in range(0, batch_size, share)]
            for p in range(processes)
        ]
        yield TrainingStep(
            micro=parts[process],
            targets=sum(e.targets for e in whole),
            tokens=sum(document_lengths(whole)),
            position=whole[-1].position,
            numbers=[
                [(min(e.numbers[0] for e in micro), max(e.numbers[1] for e in micro)) for micro in part]
                for part in parts
            ],
        )


def micro_batches(batch_size: int, micro_batch_size: int, processes: int) -> int:
    """How many of a step each process has.

    Raises:
        TrainingError: ``batch_size`` is not a multiple of ``micro_batch_size * processes``.
    """
    share = micro_batch_size * processes
    if batch_size % share:
        raise TrainingError(
            f"--batch-size {batch_size} is not a multiple of --micro-batch-size {micro_batch_size} times "
            f"{processes} processes; {max(share, batch_size // share * share)} would be"
        )
    return batch_size // share


def document_lengths(examples: Sequence[Any]) -> list[int]:
    """The lengths of all documents in some examples, for counting operations."""
    return [n for example in examples for n in example.lengths]


def share_of(examples: Sequence[T], process: int, processes: int) -> list[T | None]:
    """Every process's examples, as many for each: None stands where there are none left.

    >>> share_of("abcde", 1, 2)
    ['b', 'd', None]
    """
    rounds = -(-len(examples) // processes)
    return [examples[i] if (i := r * processes + process) < len(examples) else None for r in range(rounds)]


def ahead(make: Callable[[], Iterator[T]], depth: int = 2) -> Iterator[T]:
    """The items of ``make()``, worked out in a thread up to ``depth`` items before they are asked for.

    What goes wrong in the thread is raised here.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stopped = threading.Event()
    end = object()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in make():
                put((item, None))
                if stopped.is_set():
                    return
            put((end, None))
        except BaseException as error:  # carried over to the thread that reads
            put((end, error))

    thread = threading.Thread(target=work, name="data", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
