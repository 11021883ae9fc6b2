"""In which order the backends are tried: the one that was measured fastest for a kind of request first.

The measurements are those of ``benchmarks/`` on one H200: on Hopper FlashAttention-4, then 3, then cuDNN for prefill
and training, our own kernels for decoding and for training with a bias (on one H100; flex for heads of more than 64),
cuDNN for masks and biases as scores; on Ampere and Ada FlashAttention-2 code, and memory-efficient before; on the CPU
torch's flash kernel, and elsewhere torch's own choice. ``crossovers.py`` has the numbers.
"""

from __future__ import annotations

from .backends import flash4
from .backends.registry import with_registered
from .backends.torch_sdpa import kernel
from .crossovers import SHIPPED, crossovers, has_many_rows, is_small
from .request import AttentionRequest
from .visibility import DENSE, FULL

_CPU = ("torch_sdpa", "reference", "triton_decode", "triton_bias", "torch_varlen", "flex", "flash4", "flash3", "flash2")
_AMD = ("torch_sdpa", "flex", "reference", "torch_varlen", "triton_decode", "triton_bias", "flash4", "flash3", "flash2")
_DECODE = (
    "triton_decode", "flash3", "torch_sdpa", "flash4", "torch_varlen", "flash2", "flex", "reference", "triton_bias",
)  # fmt: skip
_FULL = (
    "flash4", "flash3", "torch_sdpa", "flash2", "torch_varlen", "flex", "reference", "triton_decode", "triton_bias",
)  # fmt: skip
_MASKED = (
    "flash4", "flash3", "flash2", "torch_varlen", "flex", "torch_sdpa", "reference", "triton_decode", "triton_bias",
)  # fmt: skip
#: before Ampere: Triton has multiplied without tensor cores there since 3.3, torch's memory-efficient kernel has them
_EARLY = (
    "torch_sdpa", "flex", "reference", "triton_decode", "triton_bias", "torch_varlen", "flash4", "flash3", "flash2",
)  # fmt: skip
#: training with a bias, in half precision: before what sums the bias's gradient in memory of B x H x Sq x Sk
_BIASED = (
    "flash4", "flash3", "flash2", "torch_varlen", "flex", "triton_bias", "torch_sdpa", "reference", "triton_decode",
)  # fmt: skip

#: queries of a tree that share a KV head, up to which our kernel, which reads K and V again for every 64 of them, beats
#: cuDNN with a mask of scores, whose keys that nobody sees are cleaned (one H100: benchmarks/results/recorded_step.md)
TREE_ROWS = 512


def order(request: AttentionRequest) -> tuple[str, ...]:
    """All backends, the one that was measured fastest for this kind of request first."""
    return with_registered(_ours(request))


def _ours(request: AttentionRequest) -> tuple[str, ...]:
    if request.device == "hip":
        return _AMD
    if request.device != "cuda":
        return _CPU
    if request.q_class < 17 and not request.grad:  # decoding: bytes, not arithmetic
        return _first(rival(request), _DECODE) if has_many_rows(request) else _DECODE
    if request.capability < 80:
        return _EARLY
    if request.tree and request.rows <= TREE_ROWS:
        return _first("triton_decode", _MASKED)
    if request.visibility == FULL and not request.windowed and not request.bias:
        return _first("torch_sdpa", _FULL) if is_small(request) else _FULL
    if request.bias and request.grad and request.half:
        return _BIASED if max(request.head_dim, request.value_dim) > 64 else _first("triton_bias", _BIASED)
    if (request.bias or request.visibility == DENSE) and kernel(request) == "cudnn":
        return _first("torch_sdpa", _MASKED)
    return _FULL if request.visibility == FULL and not request.windowed else _MASKED


def rival(request: AttentionRequest) -> str:
    """What takes over from our decoding kernel at many rows: FlashAttention-4, or what this GPU was tuned with."""
    plain = request.visibility == FULL and not (request.windowed or request.bias)
    return "torch_sdpa" if plain and crossovers() != SHIPPED and flash4.missing() else "flash4"


def _first(name: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return (name, *(n for n in names if n != name))
