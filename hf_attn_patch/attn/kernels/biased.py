"""Attention with an additive bias, differentiable in the bias too, by Triton: what T5 and its kind train with.

The plain truth is autograd through ``softmax(scale * Q @ K.T + bias) @ V``. In memory is nothing as large as the scores
but the bias and its gradient themselves, and a new length compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_attn_patch.attn.devices import device_of, shared_memory
from hf_attn_patch.compat.triton import raw_stream

from . import biased_kernels as kernels
from .decode_line import LOG2E
from .launcher import Launch

#: further than any length: a side without a border
_FAR = 1 << 30
_LOG2E = float(LOG2E.value)
_launches: dict[Any, Launch] = {}
_MOST_LAUNCHES = 1024


class Biased(NamedTuple):
    """Who sees whom, and the numbers of a call.

    Args:
        sides: how many keys to the left and right of its own (the last query's own is the last key) a query sees; None:
            all of them.
        first, end: int32 [B], the keys of each row, or None.
        mask: bool [B or 1, HQ or 1, Sq, Sk], or None.
        dropout: the share of weights that is dropped.
        read: the bias as it is read (it may be a copy whose rows are aligned to 16 bytes), or None: as it is given.
        clean: puts zeros into K and V where no query looks, or None. Such keys have no weight, so they get no gradient.
    """

    scale: float
    sides: tuple[int | None, int | None] = (None, None)
    first: Tensor | None = None
    end: Tensor | None = None
    mask: Tensor | None = None
    dropout: float = 0.0
    read: Tensor | None = None
    clean: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


class Block(NamedTuple):
    """The shape of a program's tiles, and how it runs."""

    M: int
    N: int
    warps: int
    stages: int
    registers: int | None = None


#: by kernel, for heads of up to 64 and up to 128: what was fastest on one H100 (B 8, 1,024 x 1,024, 12 heads, bf16)
BLOCKS = {
    "forward": {64: Block(128, 64, 8, 3, 128), 128: Block(128, 64, 8, 3)},
    "queries": {64: Block(64, 64, 4, 2, 128), 128: Block(128, 64, 8, 3)},
    "keys": {64: Block(64, 64, 4, 3), 128: Block(64, 64, 4, 2)},
    "bias": {64: Block(64, 64, 4, 3), 128: Block(64, 128, 8, 2)},
}
#: for all kernels where a program has less shared memory than on Hopper; not measured
SMALLER = {64: Block(64, 64, 4, 2), 128: Block(64, 32, 4, 2)}
_ROOM = 227 * 1024  # bytes that BLOCKS may take


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, call: Biased) -> Tensor:
    """Softmax attention with an additive bias.

    Args:
        q: [B, HQ, Sq, D], k: [B, HKV, Sk, D], v: [B, HKV, Sk, Dv], fp16, bf16 or fp32, D and Dv up to 128.
        bias: floating point, broadcastable to [B, HQ, Sq, Sk]; added to the scaled scores.

    Returns:
        [B, HQ, Sq, Dv] (laid out as [B, Sq, HQ, Dv]); zeros for queries that see no key. Differentiable in the four,
        once; the gradients of a group of heads, and of whatever shares a bias, are added up in fp32.
    """
    bias = bias[(None,) * (4 - bias.dim())]
    out: Tensor = _Attention.apply(q, k, v, bias, call)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, call: Biased) -> Tensor:
        if call.clean is not None:
            k, v = call.clean(k, v)
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        B, HQ, Sq, _ = q.shape
        DV = v.shape[-1]
        out = q.new_empty(B, Sq, HQ, DV).transpose(1, 2)
        lse = torch.empty(B * HQ, Sq, dtype=torch.float32, device=q.device)
        seed = torch.empty((), dtype=torch.int64, device=q.device)
        if call.dropout:
            seed.random_()  # from the device's generator: nothing waits, and checkpoints find it again
        read = bias if call.read is None else call.read
        kind = _Kind(q, k, v, read, call)
        block = kind.block("forward")
        grid = (triton.cdiv(Sq, block.M) * B, HQ)
        strides = (*kind.strides, *out.stride()[:3])
        scalars = (*kind.numbers, call.scale * _LOG2E, call.dropout)
        _start("forward", grid, (*kind.tensors, seed, out, lse), strides, scalars, kind.constants, block)
        ctx.save_for_backward(q, k, v, read, out, lse, seed)
        ctx.call, ctx.bias = call, (bias.shape, bias.dtype)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, read, out, lse, seed = ctx.saved_tensors
        call, (shape, dtype) = ctx.call, ctx.bias
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        B, HQ, Sq, _ = q.shape
        HKV, Sk = k.shape[1], k.shape[2]
        kind, delta = _Kind(q, k, v, read, call), torch.empty_like(lse)
        shared = B if shape[0] == 1 else 1, HQ if shape[1] == 1 else 1  # rows and heads that share a bias

        def launch(name: str, grid: tuple[int, int], *into: Tensor, of: tuple[Tensor, ...], **constants: Any) -> None:
            strides = (*kind.strides, *(s for t in of for s in t.stride()[:3]))
            scalars = (*shared, *kind.numbers, call.scale * _LOG2E, call.scale, call.dropout)
            tensors = (*kind.tensors, seed, *of, lse, delta, *into)
            _start(name, grid, tensors, strides, scalars, kind.constants | constants, kind.block(name))

        gq, gbias = torch.empty(q.shape, dtype=q.dtype, device=q.device), None
        alone = ctx.needs_input_grad[3] and shared == (1, 1)
        if ctx.needs_input_grad[3]:
            whole = shape[2:] == (Sq, Sk)
            make = torch.zeros if alone else torch.empty
            # what comes to be summed up further stays in fp32
            gbias = make((B // shared[0], HQ // shared[1], Sq, Sk), dtype=dtype if whole else torch.float32,
                         device=q.device)  # fmt: skip
        into = gbias if alone and gbias is not None else gq
        grid = (triton.cdiv(Sq, kind.block("queries").M) * B, HQ)
        launch("queries", grid, gq, into, of=(out, grad), ALONE=alone)
        gk = gv = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            gk, gv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
            launch("keys", (triton.cdiv(Sk, kind.block("keys").N) * B, HKV), gk, gv, of=(grad,))
        if gbias is not None and not alone:
            block = kind.block("bias")
            tiles = triton.cdiv(Sq, block.M) * triton.cdiv(Sk, block.N)
            launch("bias", (tiles, gbias.shape[0] * gbias.shape[1]), gbias, of=(grad,))
        return gq, gk, gv, None if gbias is None else gbias.sum_to_size(shape).to(dtype), None


class _Kind:
    """What all kernels of a call are handed: the first tensors, their strides, and the numbers, in the kernels' order.

    Where there is no such tensor, one that is never read. Strides are of q, k and v without the last, and of bias and
    mask, 0 where they are broadcast.
    """

    __slots__ = ("_blocks", "_wide", "constants", "numbers", "strides", "tensors")

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, call: Biased) -> None:
        (B, HQ, Sq, D), (HKV, Sk, DV) = q.shape, (k.shape[1], k.shape[2], v.shape[3])
        mask = q if call.mask is None else call.mask.view(torch.uint8)
        first = q if call.first is None else call.first
        self._blocks, self._wide = _blocks_for(q, v), bias.element_size() > 2 or call.mask is not None
        self.tensors = q, k, v, bias, mask, first, first if call.end is None else call.end
        *outer, inner = _strides_of(bias)
        unit = 16 // bias.element_size()  # rows of 16 bytes' alignment are read as such
        unit = unit if inner <= 1 and not any(s % unit for s in outer) and bias.data_ptr() % 16 == 0 else 1
        of_bias = (*(s // unit for s in outer), inner)
        of_mask = (0, 0, 0, 0) if call.mask is None else _strides_of(call.mask)
        self.strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *of_bias, *of_mask)
        left, right = (_FAR if side is None else side for side in call.sides)
        self.numbers = B, HQ, HQ // HKV, Sq, Sk, Sk - Sq, left, right
        self.constants: dict[str, Any] = {
            "D": D, "DV": DV, "BLOCK_D": _width(D), "BLOCK_DV": _width(DV), "UNIT": unit,
            "MASK": call.mask is not None, "BANDED": call.sides != (None, None), "BOUNDED": call.first is not None,
            "EIGHTS": Sk % 8 == 0,
            "DROPOUT": call.dropout > 0.0, "PRECISION": "ieee",
        }  # fmt: skip

    def block(self, name: str) -> Block:
        """The tiles of a kernel; those of more than 16 bits a score, whatever it is read from, are fetched less far
        ahead, so that they fit."""
        block = self._blocks.get(name) or self._blocks[""]
        return block._replace(stages=2) if self._wide and block.stages > 2 else block


def _blocks_for(q: Tensor, v: Tensor) -> dict[str, Block]:
    """By kernel, or for all under no name."""
    width = 64 if max(q.shape[-1], v.shape[-1]) <= 64 else 128
    here = device_of(q.device)
    small = here.device == "cuda" and shared_memory(here.capability) < _ROOM
    blocks = {"": SMALLER[width]} if small else {name: of_width[width] for name, of_width in BLOCKS.items()}
    if q.dtype.itemsize == 2:
        return blocks
    return {name: Block(min(block.M, 64), 32, block.warps, 1) for name, block in blocks.items()}


def _strides_of(t: Tensor) -> tuple[int, ...]:
    return tuple([0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)])


def _start(
    name: str, grid: tuple[int, int], tensors: tuple[Tensor, ...], strides: tuple[int, ...],
    scalars: tuple[float, ...], constants: dict[str, Any], block: Block,
) -> None:  # fmt: skip
    """Start one kernel; what Triton asks of its arguments is asked once for calls of one kind."""
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _start(name, grid, tensors, strides, scalars, constants, block)
        return
    pointers = [t.data_ptr() for t in tensors]
    kinds = tuple([(t.dtype, p % 16 == 0) for t, p in zip(tensors, pointers, strict=True)])
    key = (name, device, grid, kinds, strides, scalars, *constants.values(), block)
    launch = _launches.get(key)
    if launch is not None:
        launch(raw_stream(device), tensors, pointers)
        return
    options = {"num_warps": block.warps, "num_stages": block.stages}
    if block.registers is not None:
        options["maxnreg"] = block.registers
    constants = constants | {"BLOCK_M": block.M, "BLOCK_N": block.N}
    launch = Launch(getattr(kernels, f"{name}_kernel"), grid, (*strides, *scalars), constants, options)
    launch.first(strides, tensors, pointers, raw_stream(device))
    if len(_launches) >= _MOST_LAUNCHES:
        _launches.clear()
    _launches[key] = launch


def _width(D: int) -> int:
    return max(16, int(triton.next_power_of_2(D)))
