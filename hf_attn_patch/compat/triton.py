"""Triton's launcher: what a compiled kernel holds, and how it is started without Triton's work at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs


class CompiledParts(NamedTuple):
    """What starting a compiled kernel takes.

    Attributes:
        function: the driver's handle of the kernel.
        metadata: what the launcher is handed with it.
        call: the C function that starts it, or None: then only ``compiled[grid]`` does.
        pdl: whether it starts before the kernel in front of it has ended.
    """

    function: Any
    metadata: Any
    call: Callable[..., Any] | None
    pdl: bool


def compiled_parts(kernel: Any) -> CompiledParts | None:
    """The parts of what ``kernel[grid](...)`` returned; None for interpreted kernels, and for a Triton that names them
    otherwise than 3.6 and 3.7 do: such a kernel is started by Triton itself at every call, which is slower and right.

    The C function takes arguments that are known for Triton 3.6 alone.
    """
    try:
        function, metadata, run = kernel.function, kernel.packed_metadata, kernel.run
    except AttributeError:
        return None
    if not triton.__version__.startswith("3.6.") or type(run).__name__ != "CudaLauncher":
        return CompiledParts(function, metadata, None, False)
    needs_more = run.global_scratch_size or run.profile_scratch_size or run.launch_cooperative_grid
    return CompiledParts(function, metadata, None if needs_more else run.launch, run.launch_pdl)


def is_watched() -> bool:
    """Whether somebody (a profiler) wants to be told of launches; true where that cannot be asked (Triton 3.6, 3.7)."""
    try:
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    except AttributeError:
        return True
    return bool(
        (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))
    )


def raw_stream(device: torch.device) -> int:
    """The current stream of a device, as the driver's handle (0 for what is no GPU)."""
    if device.type != "cuda":
        return 0
    try:  # a tenth of the time of asking torch
        return int(triton.runtime.driver.active.get_current_stream(device.index))
    except AttributeError:
        return int(torch.cuda.current_stream(device).cuda_stream)
