"""Several processes that convert one model together, each on its own GPU: by accelerate.

All run the same program on the same plan. What is worked out on calibration samples is shared out: a process sends
its part of them through a layer, and sums of moments and gradients are those of all. One process, the main one,
writes.

An error of one is an error of all: before every exchange all say whether they are well, so that a process that
failed meets the others there, wherever they are, and tells them its sentence.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor

from hf_attn_patch.documents.bars import no_progress
from hf_attn_patch.errors import ConversionError, HFAttnError, one_line, sentence_of

#: how long a process waits for one that does not answer; one that was killed is noticed at once. Long, because the
#: main one copies what is no attention meanwhile
TIMEOUT = timedelta(hours=1)


class AgreedError(ConversionError):
    """An error that all processes know of, and that the main one tells."""


class LostProcessError(ConversionError):
    """Another process is gone, or does not answer."""


class Processes:
    """One process, which has everything to itself; :class:`Several` is what more of them are.

    Attributes:
        count: of all; number: of this one, from 0.
    """

    count, number = 1, 0

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.number == 0

    def share(self, n: int) -> slice:
        """Which of ``n`` things are for this process: as many as for the others, or one more.

        >>> Processes().share(5)
        slice(0, 5, None)
        """
        return _share(n, self.number, self.count)

    def seed(self, seed: int) -> int:
        """For what each process draws for itself: ``seed`` in the main one, others in the others."""
        return seed if self.main else random.Random(f"{seed} {self.number}").getrandbits(62)

    def gathered(self, mine: Tensor, n: int) -> Tensor:
        """[n, ...] from every process's :meth:`share` [m, ...] of it, on the same device; the same for all."""
        return mine

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum over all processes of each tensor."""
        return list(tensors)

    def total(self, *numbers: float) -> list[float]:
        """The sum over all processes of each number."""
        return list(numbers)

    def of_main(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The main process's tensors, which have the same shapes and dtypes in all."""
        return list(tensors)

    def everybody(self, value: Any) -> list[Any]:
        """Every process's ``value`` (whatever pickle takes), in order."""
        return [value]

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """An error of one process within is raised in all.

        Raises:
            AgreedError: some process raised an :class:`HFAttnError`; with several processes also for its own.
        """
        yield

    def require_same(self, tensors: Sequence[Tensor], what: str) -> None:
        """See that all processes have the same tensors.

        Raises:
            ConversionError: they have not; ``what`` is named.
        """
        if self.count == 1:
            return
        digest = hashlib.sha256()
        for x in tensors:
            digest.update(repr(x.shape).encode())
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if len(set(self.everybody(digest.hexdigest()))) > 1:
            raise ConversionError(
                f"the {self.count} processes found different {what}; give --calibrate files that all of them see alike"
            )


def _share(n: int, number: int, count: int) -> slice:
    """
    >>> [_share(5, i, 3) for i in range(3)], [_share(1, i, 2) for i in range(2)]
    ([slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)], [slice(0, 1, None), slice(1, 1, None)])
    """
    start = number * (n // count) + min(number, n % count)
    return slice(start, start + n // count + (number < n % count))


class Several(Processes):
    """The processes that a launcher started, as accelerate finds them.

    Args:
        cpu: they run on CPUs.
    """

    def __init__(self, cpu: bool) -> None:
        from accelerate import PartialState

        there = torch.distributed.is_initialized()
        self.state = PartialState(cpu=cpu, timeout=TIMEOUT)
        if not there:  # it lasts: there may be another conversion
            atexit.register(self._part)
        self.count, self.number = self.state.num_processes, self.state.process_index
        self.lost = False

    def gathered(self, mine: Tensor, n: int) -> Tensor:
        from accelerate.utils import gather

        most = -(-n // self.count)
        rows = mine.to(self.state.device)
        if len(rows) < most:  # all must send as much
            rows = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        parts = self._exchange(gather, rows).split(most)
        sizes = [_share(n, i, self.count) for i in range(self.count)]
        found = torch.cat([part[: s.stop - s.start] for part, s in zip(parts, sizes, strict=True)])
        return found.to(mine.device)

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        from accelerate.utils import reduce

        if not tensors:
            return []
        flat = torch.cat([x.detach().to(self.state.device).flatten() for x in tensors])
        return _like(self._exchange(reduce, flat, "sum"), tensors)

    def total(self, *numbers: float) -> list[float]:
        # a backend without fp64 (MPS) has no processes either
        found: list[float] = self.summed([torch.tensor(numbers, dtype=torch.float64)])[0].tolist()
        return found

    def of_main(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        from accelerate.utils import broadcast

        if not tensors:
            return []
        flat = torch.cat([x.detach().to(self.state.device).flatten() for x in tensors])
        return _like(self._exchange(broadcast, flat), tensors)

    def everybody(self, value: Any) -> list[Any]:
        from accelerate.utils import gather_object

        found: list[Any] = self._exchange(gather_object, [value])
        return found

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        try:
            yield
            self.meet()
        except (AgreedError, LostProcessError):
            raise
        except HFAttnError as error:
            self._fail(str(error), error)

    def _fail(self, sentence: str, error: Exception) -> NoReturn:
        try:
            self.meet(sentence)
        except AgreedError as agreed:
            raise agreed from error
        raise AssertionError("an error was told to nobody")

    def meet(self, sentence: str | None = None) -> None:
        """Say that all is well, or what is not, and hear the same of the others.

        Raises:
            AgreedError: not all is well.
            LostProcessError: somebody is missing.
        """
        from accelerate.utils import gather_object, reduce

        flag = torch.tensor(float(sentence is not None), device=self.state.device)
        if not float(self._try(reduce, flag, "max")):
            return
        sentences = self._try(gather_object, [sentence])
        raise AgreedError(next(text for text in sentences if text is not None))

    def _exchange(self, operation: Any, *arguments: Any) -> Any:
        self.meet()
        return self._try(operation, *arguments)

    def _try(self, operation: Any, *arguments: Any) -> Any:
        try:
            return operation(*arguments)
        except RuntimeError as error:  # what gloo and NCCL raise of a peer that is gone or late
            self.lost = True
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise LostProcessError(
                f"process {self.number} of {self.count}: another process of this conversion is gone, or did not"
                f" answer for {TIMEOUT.total_seconds() / 60:g} minutes; nothing was written to the destination"
            ) from error

    def leave(self) -> None:
        """Wait until all have ended their work: a launcher ends them all as soon as one of them failed."""
        if not self.lost:
            with contextlib.suppress(LostProcessError):  # whoever is gone has told why
                self._try(self.state.wait_for_everyone)

    def _part(self) -> None:
        if not self.lost:
            self.state.destroy_process_group()


def _like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape).to(x) for part, x in zip(parts, tensors, strict=True)]


_ALONE = Processes()
_current: ContextVar[Processes] = ContextVar("processes", default=_ALONE)


def current() -> Processes:
    """The processes of the innermost :func:`together`; outside one, this process alone."""
    return _current.get()


def launched() -> int:
    """How many processes a launcher (``accelerate launch``, ``torchrun``) started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def together(device: str | None = None) -> Iterator[Processes]:
    """Within, :func:`convert` is the work of all processes that a launcher started; without a launcher, of this one.

    All must enter, with the same arguments. The main process alone writes and shows progress.

    Args:
        device: as ``--device``: None (each its GPU, if there are any) or "cpu".

    Raises:
        ConversionError: what went wrong in any of them; :class:`AgreedError` where all know.
    """
    if launched() < 2 or current() is not _ALONE:
        yield current()
        return
    if device not in (None, "cpu", "cuda"):
        raise ConversionError(f"--device {device}: of {launched()} processes each takes its own GPU; leave it out")
    processes = Several(cpu=device == "cpu" or not torch.cuda.is_available())
    token = _current.set(processes)
    try:
        with no_progress(not processes.main):
            yield processes
        processes.meet()
    except (AgreedError, LostProcessError):
        raise
    except Exception as error:
        _tell(processes, error)
        raise
    finally:
        _current.reset(token)
        processes.leave()


def _tell(processes: Several, error: Exception) -> None:
    """Let the others know of an error; AgreedError takes the place of one that a user can cause."""
    if processes.lost:
        return
    known = sentence_of(error)
    sentence = known or f"{type(error).__name__}: {one_line(error)}"
    try:
        processes.meet(sentence if processes.main else f"process {processes.number}: {sentence}")
    except LostProcessError:
        return
    except AgreedError as agreed:
        if known:
            raise agreed from error
