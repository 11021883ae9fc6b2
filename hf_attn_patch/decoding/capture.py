"""Work that is recorded once as a CUDA graph and run again by one call of the host."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from hf_attn_patch.compat.torch import leave_graph_pool

from .outputs import UnfitError

Work = Callable[[], Any]


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU that work is tried and recorded on. cuBLAS keeps a workspace for each stream: it must be
    there before the recording, and outlive it."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def not_collecting() -> Iterator[None]:
    """Within, Python looks for no cycles: a look at all objects takes a tenth of a second where transformers is loaded,
    and what is destroyed in the middle of a recording may be a graph, or an event."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


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


class WaitsError(UnfitError):
    """Work that waits for the device cannot be recorded."""


def rehearse(work: Work, device: torch.device, watched: bool = True) -> Any:
    """Run ``work`` as it will be recorded: kernels are compiled and libraries set up, which a recording cannot do.

    Args:
        watched: find out whether it waits for the device.

    Raises:
        WaitsError: the work waits for the device. That is found out here, because an error while recording leaves
            PyTorch's random generator and allocator in states that are hard to come back from.
    """
    if device.type != "cuda":
        return work()
    if not watched:
        with _aside(device):
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


class _Pool:
    """Memory for what recordings hold between their kernels; those that run on one stream share it.

    It is held by a recording of its own: an id that no recording uses any more must not be used again (the allocator
    of pinned memory says so with an internal error).
    """

    def __init__(self, device: torch.device) -> None:
        self.id = torch.cuda.graph_pool_handle()
        # the first recording of a process makes tensors for the random generator: not under inference_mode
        with torch.inference_mode(False):
            self.one = torch.zeros(1, device=device)
            self.holder = _captured(lambda: self.one.zero_(), device, self.id)[0]


_pools: dict[tuple[torch.device, int], _Pool] = {}
#: what failed must live on: allocators go on asking it whether a stream is its own
_failed: list[torch.cuda.CUDAGraph] = []


def _pool(device: torch.device) -> _Pool:
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _pools:
        _pools[key] = _Pool(device)
    return _pools[key]


def _captured(work: Work, device: torch.device, pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """``work`` as a CUDA graph with its result; after an error the device is as it was before."""
    graph = torch.cuda.CUDAGraph()
    with not_collecting(), torch.cuda.device(device), _aside(device):
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            result = work()
            graph.capture_end()
        except BaseException:
            _abandon(graph, device, pool)
            raise
    return graph, result


def _abandon(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """Come back from a recording that failed, on its stream; the error to tell is the one that brought us here."""
    try:
        graph.capture_end()
        graph.reset()
        return  # the error was not one of CUDA's: the recording ended as it should
    except RuntimeError:  # the driver has dropped the recording, and PyTorch did not notice
        _failed.append(graph)
    with contextlib.suppress(RuntimeError):  # not begun, or ended already
        leave_graph_pool(device.index, pool)
    graph.reset()
    for key in [key for key, known in _pools.items() if known.id == pool]:
        del _pools[key]
    # the random generator goes on believing that it is recorded, until a recording ends well
    with torch.inference_mode(False):
        one = torch.zeros(1, device=device)
        ends_well = torch.cuda.CUDAGraph()
        ends_well.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        one.zero_()
        ends_well.capture_end()


class Recording:
    """``work`` recorded on ``device``; nothing runs before :meth:`replay`.

    Args:
        work: launches kernels on the current stream; allocations that outlive it are its result.

    Raises:
        RuntimeError: the work waits for the device, or does something else that cannot be recorded.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self.pool = _pool(device)
        self.graph, self.result = _captured(work, device, self.pool.id)

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
