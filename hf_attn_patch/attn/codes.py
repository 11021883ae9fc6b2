"""Keys and values as codes of 8 bits with a scale: what a cache of codes holds, and how numbers become codes and back.

Each head of each token has its own scale, so that its largest component is the largest code (symmetric, by the absolute
maximum): a token can be written when it comes and is never looked at again. int8 divides that range evenly; e4m3
(Micikevicius et al. 2022, arXiv 2209.05433) is finer near zero and coarser near the ends. Both are exact as fp16
and bf16; what is lost is lost in rounding to them. Of keys e4m3 loses too much wherever its scale is, so "fp8" is e4m3
for values alone. ``benchmarks/results/kv_codes.md`` has what it costs, and why there are no scales by channel.

Buffers hold both as int8, the bits of what they are: torch has few operations for fp8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .devices import runs_triton


class Codes(NamedTuple):
    """Codes of numbers: their dtype, and the largest one."""

    dtype: torch.dtype
    largest: float


class Kind(NamedTuple):
    """What a cache of codes holds: its name, and the codes of keys and of values."""

    name: str
    keys: Codes
    values: Codes

    def of(self, which: int) -> Codes:
        """Those of keys (0) or of values (1)."""
        return self.values if which else self.keys


INT8, E4M3 = Codes(torch.int8, 127.0), Codes(torch.float8_e4m3fn, 448.0)
KINDS = {"int8": Kind("int8", INT8, INT8), "fp8": Kind("fp8", INT8, E4M3)}


def pack(states: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Numbers [..., D] as the bits of their codes, int8 [..., D], and scales, fp32 [..., 1].

    What is not finite makes its scale so, and comes back as NaN.

    >>> bits, scales = pack(torch.tensor([[0.5, -2.0, 254.0], [0.0, 0.0, 0.0]]), INT8)
    >>> bits.tolist(), scales.tolist()
    ([[0, -1, 127], [0, 0, 0]], [[2.0], [0.0]])
    """
    numbers = states.detach().to(torch.float32)
    largest = torch.full((), codes.largest, device=numbers.device)  # by a number, GPUs multiply by its reciprocal
    scales = numbers.abs().amax(-1, keepdim=True) / largest
    numbers = (numbers / torch.where(scales == 0, 1.0, scales)).clamp_(-codes.largest, codes.largest)
    if codes.dtype == torch.int8:
        numbers = numbers.round_()
    return numbers.to(codes.dtype).view(torch.int8), scales


def pack_both(keys: Tensor, values: Tensor, kind: Kind) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """:func:`pack` of keys [B, HKV, S, D] and of values [B, HKV, S, Dv].

    On a GPU by one kernel: a token's dozen of small ones would take longer than the reading that codes save.
    """
    least = 89 if E4M3 in kind else 70  # e4m3 is rounded to by an instruction that GPUs have from Ada on
    if type(keys) is Tensor and not torch.compiler.is_compiling() and runs_triton(keys.device, least):
        from .kernels.pack_codes import packed

        return packed(keys.detach(), values.detach(), kind.keys.dtype, kind.values.dtype)
    return pack(keys, kind.keys), pack(values, kind.values)


def kind_named(name: str) -> Kind:
    """The kind of codes of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in KINDS:
        raise ValueError(f"there are no codes {name!r} for keys and values; choose {' or '.join(map(repr, KINDS))}")
    return KINDS[name]


def as_codes(bits: Tensor, codes: Codes) -> Tensor:
    """Bits as the codes that they are (a view)."""
    return bits if codes.dtype == torch.int8 else bits.view(codes.dtype)


def unpack(bits: Tensor, scales: Tensor, codes: Codes, dtype: torch.dtype) -> Tensor:
    """The numbers [..., D] that codes stand for, in ``dtype``.

    >>> bits, scales = pack(torch.tensor([0.3, -2.0, 4.0]), E4M3)
    >>> unpack(bits, scales, E4M3, torch.float32)
    tensor([ 0.2857, -2.0000,  4.0000])
    """
    numbers = as_codes(bits, codes)
    if codes.dtype != torch.int8:  # torch multiplies e4m3 by nothing else
        numbers = numbers.to(dtype)
    out = torch.empty(bits.shape, dtype=dtype, device=bits.device)
    return torch.mul(numbers, scales.to(dtype) if dtype == torch.float64 else scales, out=out)
