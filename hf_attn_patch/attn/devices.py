"""What devices can do: NVIDIA GPUs by compute capability, AMD GPUs under a name of their own, and the others.

torch calls AMD GPUs "cuda" and gives them capabilities that look like NVIDIA's (9.4 for an MI300); in requests they are
"hip". Capabilities are written 75 for 7.5. What each kernel needs is torch's own check of it
(``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``) or what the package's documentation says.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple, Protocol

import torch

#: whether our kernels can be imported
HAS_TRITON = importlib.util.find_spec("triton") is not None

#: the least capability of a generation -> its name
GENERATIONS = {70: "Volta", 75: "Turing", 80: "Ampere", 89: "Ada", 90: "Hopper", 100: "Blackwell", 120: "Blackwell"}

#: the least capability -> KiB of shared memory that one block can have (CUDA's programming guide, "technical
#: specifications per compute capability")
_SHARED = {70: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 120: 99}


class Device(NamedTuple):
    """``device``: "cpu", "cuda", "hip", "mps", "xpu", ...; ``capability``: of "cuda", else 0."""

    device: str
    capability: int


class _Asks(Protocol):
    @property
    def device(self) -> str: ...
    @property
    def capability(self) -> int: ...


_known: dict[torch.device, Device] = {}


def device_of(device: torch.device) -> Device:
    """What a torch device is."""
    known = _known.get(device)
    if known is None:
        known = Device(device.type, 0)
        if device.type == "cuda" and torch.version.hip is not None:
            known = Device("hip", 0)
        elif device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            known = Device("cuda", 10 * major + minor)
        _known[device] = known
    return known


def generation(capability: int) -> str:
    """The name of a GPU's generation.

    >>> generation(86), generation(90), generation(121)
    ('Ampere', 'Hopper', 'Blackwell')
    """
    return next((name for least, name in sorted(GENERATIONS.items(), reverse=True) if capability >= least), "older")


def shared_memory(capability: int) -> int:
    """Bytes of shared memory that one block can have.

    >>> [shared_memory(capability) // 1024 for capability in (70, 75, 80, 86, 89, 90, 103, 121)]
    [96, 64, 163, 99, 99, 227, 227, 99]
    """
    return 1024 * next(kib for least, kib in sorted(_SHARED.items(), reverse=True) if capability >= least)


def tile_room(capability: int) -> int:
    """The largest tile of K and V, in bytes, that a block of the decode kernel can hold beside what else it keeps.

    Two of three stages are in flight from Ampere on. Before it Triton copies nothing while it computes: one tile.
    (Compiled for 7.5, a tile of 65,536 bytes takes 73,728; for 8.0, 139,264.)
    """
    return (shared_memory(capability) - 10240) // (2 if capability >= 80 else 1)


def needs_nvidia(request: _Asks, least: int, below: int = 1000) -> str | None:
    """Why a kernel for NVIDIA GPUs from capability ``least``, and below ``below``, does not run there; or None.

    >>> needs_nvidia(Device("cuda", 75), 80)
    'needs a GPU of compute capability 8.0 (Ampere) or newer, not 7.5 (Turing)'
    >>> needs_nvidia(Device("hip", 0), 80)
    'needs an NVIDIA GPU'
    """
    if request.device == "hip":
        return "needs an NVIDIA GPU"
    if request.device != "cuda":
        return "needs a CUDA device"
    here = f"{request.capability / 10:.1f} ({generation(request.capability)})"
    if request.capability < least:
        return f"needs a GPU of compute capability {least / 10:.1f} ({generation(least)}) or newer, not {here}"
    if request.capability >= below:
        return f"needs a GPU of compute capability below {below / 10:.1f}, not {here}"
    return None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def runs_triton(device: torch.device, least: int = 70) -> bool:
    """Whether our kernels are compiled for this device, a CUDA GPU of at least this capability."""
    here = device_of(device)
    return HAS_TRITON and here.device == "cuda" and here.capability >= least


def lacks(least: int, below: int = 1000) -> str | None:
    """:func:`needs_nvidia` of this machine's first GPU."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return needs_nvidia(device_of(torch.device("cuda", torch.cuda.current_device())), least, below)


def half_of(device: torch.device) -> torch.dtype:
    """The half precision of a GPU: bf16, or fp16 where there is no arithmetic for it."""
    return torch.float16 if no_bf16(device_of(device), torch.bfloat16) else torch.bfloat16


def no_bf16(request: _Asks, dtype: torch.dtype) -> str | None:
    """Why bf16 does not run on a GPU, or None: before Ampere there is no arithmetic for it."""
    if request.device == "cuda" and request.capability < 80 and dtype == torch.bfloat16:
        return f"bf16 needs compute capability 8.0 (Ampere), not {request.capability / 10:.1f}; use float16"
    return None


def no_wide_flash_backward(request: _Asks, head_dim: int, dropout: bool) -> str | None:
    """Why FlashAttention-2's backward does not take a head dimension: GPUs with 99 KiB of shared memory a block."""
    small = request.device == "cuda" and (86 <= request.capability <= 89 or request.capability >= 120)
    if small and (192 < head_dim <= 224 or (head_dim > 224 and dropout)):
        return (
            f"the backward with head_dim {head_dim} needs more shared memory than {generation(request.capability)} has"
        )
    return None
