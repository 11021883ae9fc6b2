"""Keys and values as codes of 8 bits with a scale: what a cache of codes holds, and how numbers become codes and back.

Each head of each token has its own scale, so that its largest component is the largest code (symmetric, by the absolute
maximum): a token can be written when it comes and is never looked at again. int8 divides that range evenly; fp8 is
e4m3 (Micikevicius et al. 2022, arXiv 2209.05433), finer near zero and coarser near the ends. Both are exact as fp16
and bf16; what is lost is lost in rounding to them. ``benchmarks/results/kv_codes.md`` has what it costs, and why there
are no scales by channel.

Buffers hold both as int8, the bits of what they are: torch has few operations for fp8.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from .devices import device_of


class Kind(NamedTuple):
    """A kind of codes: its name, the dtype of its codes, and the largest one."""

    name: str
    dtype: torch.dtype
    largest: float


KINDS = {
    "int8": Kind("int8", torch.int8, 127.0),
    "fp8": Kind("fp8", torch.float8_e4m3fn, 448.0),
}


def pack(states: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Numbers [..., D] as the bits of their codes, int8 [..., D], and scales, fp32 [..., 1].

    What is not finite makes its scale so, and comes back as NaN.

    >>> bits, scales = pack(torch.tensor([[0.5, -2.0, 254.0], [0.0, 0.0, 0.0]]), KINDS["int8"])
    >>> bits.tolist(), scales.tolist()
    ([[0, -1, 127], [0, 0, 0]], [[2.0], [0.0]])
    """
    numbers = states.detach().to(torch.float32)
    largest = torch.full((), kind.largest, device=numbers.device)  # by a number, GPUs multiply by its reciprocal
    scales = numbers.abs().amax(-1, keepdim=True) / largest
    codes = (numbers / torch.where(scales == 0, 1.0, scales)).clamp_(-kind.largest, kind.largest)
    if kind.dtype == torch.int8:
        codes = codes.round_()
    return codes.to(kind.dtype).view(torch.int8), scales


def pack_both(keys: Tensor, values: Tensor, kind: Kind) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """:func:`pack` of keys [B, HKV, S, D] and of values [B, HKV, S, Dv].

    On a GPU by one kernel: a token's dozen of small ones would take longer than the reading that codes save.
    """
    if type(keys) is Tensor and not torch.compiler.is_compiling() and _has_kernel(keys.device, kind):
        from .kernels.pack_codes import packed

        return packed(keys.detach(), values.detach(), kind.dtype, kind.largest)
    return pack(keys, kind), pack(values, kind)


@functools.cache
def _has_kernel(device: torch.device, kind: Kind) -> bool:
    """fp8 is rounded to by an instruction that GPUs have from Ada on."""
    here = device_of(device)
    least = 70 if kind.dtype == torch.int8 else 89
    return here.device == "cuda" and here.capability >= least and importlib.util.find_spec("triton") is not None


def kind_named(name: str) -> Kind:
    """The kind of codes of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in KINDS:
        raise ValueError(f"there are no codes {name!r} for keys and values; choose {' or '.join(map(repr, KINDS))}")
    return KINDS[name]


def as_codes(bits: Tensor, kind: Kind) -> Tensor:
    """Bits as the codes that they are (a view)."""
    return bits if kind.dtype == torch.int8 else bits.view(kind.dtype)


def unpack(bits: Tensor, scales: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
    """The numbers [..., D] that codes stand for, in ``dtype``.

    >>> bits, scales = pack(torch.tensor([0.3, -2.0, 4.0]), KINDS["fp8"])
    >>> unpack(bits, scales, KINDS["fp8"], torch.float32)
    tensor([ 0.2857, -2.0000,  4.0000])
    """
    codes = as_codes(bits, kind)
    if kind.dtype != torch.int8:  # which torch does not multiply by anything else
        codes = codes.to(dtype)
    out = torch.empty(bits.shape, dtype=dtype, device=bits.device)
    return torch.mul(codes, scales.to(dtype) if dtype == torch.float64 else scales, out=out)
