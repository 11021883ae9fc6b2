"""Work that is recorded once as a CUDA graph and run again by one call of the host."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

Work = Callable[[], Any]


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU that work is tried and recorded on. cuBLAS keeps a workspace for each stream: it must be
    there before the recording, and outlive it."""
    return torch.cuda.Stream(device)


@cache
def _pool(device: torch.device, stream: int) -> Any:
    """Memory for what recordings hold between their kernels. Those that run on one stream can share it."""
    with torch.cuda.device(device):
        return torch.cuda.MemPool()


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """On the side stream, after all that was started before; what is started afterwards waits for it."""
    side, current = _side(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        current.wait_stream(side)


class WaitsError(RuntimeError):
    """Work that waits for the device cannot be recorded."""


def rehearse(work: Work, device: torch.device) -> Any:
    """Run ``work`` as it will be recorded: kernels are compiled and libraries set up, which a recording cannot do.

    Raises:
        WaitsError: the work waits for the device. That is found out here, because an error while recording leaves
            PyTorch's random generator and allocator in states that are hard to come back from.
    """
    if device.type != "cuda":
        return work()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught, _aside(device):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            raise WaitsError(f"it waits for the device ({warning.filename}:{warning.lineno})")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result


class Recording:
    """``work`` recorded on ``device``; nothing runs before :meth:`replay`.

    Args:
        work: launches kernels on the current stream; allocations that outlive it are its result.

    Raises:
        RuntimeError: the work waits for the device, or does something else that cannot be recorded.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self.graph = torch.cuda.CUDAGraph()
        pool = _pool(device, torch.cuda.current_stream(device).cuda_stream)
        random = torch.cuda.default_generators[device.index].clone_state()
        torch.cuda.synchronize(device)
        collecting = gc.isenabled()
        gc.disable()  # what is destroyed in the middle may be a graph, or an event
        try:
            with _aside(device):
                self.graph.capture_begin(pool=pool.id, capture_error_mode="thread_local")
                try:
                    self.result = work()
                except BaseException:
                    self._abandon(device, pool, random)
                    raise
                self.graph.capture_end()
        finally:
            if collecting:
                gc.enable()

    def _abandon(self, device: torch.device, pool: Any, random: torch.Generator) -> None:
        """After an error within: the reason is that error, whatever these say."""
        with contextlib.suppress(RuntimeError):
            self.graph.capture_end()
        with contextlib.suppress(RuntimeError, AttributeError):  # or else the allocator waits for the end forever
            torch._C._cuda_endAllocateToPool(device.index, pool.id)
        self.graph.reset()
        # the generator would go on believing that it is recorded
        torch.cuda.default_generators[device.index].graphsafe_set_state(random)

    def replay(self) -> Any:
        """Start it on the current stream; the result is the memory that it writes to."""
        self.graph.replay()
        return self.result


class Repetition:
    """The same for devices without graphs, for tests: the work is done again."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work = work

    def replay(self) -> Any:
        return self.work()


def record(work: Work, device: torch.device) -> Recording | Repetition:
    return Recording(work, device) if device.type == "cuda" else Repetition(work, device)
