"""Attention with an additive bias, differentiable in the bias too, by Triton: what T5 and its kind train with.

The plain truth is autograd through ``softmax(scale * Q @ K.T + bias) @ V``. In memory is nothing as large as the scores
but the bias and its gradient themselves, and a new length compiles nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import biased_kernels as kernels
from .decode_line import LOG2E
from .loss import _device

#: further than any length: a side without a border
_FAR = 1 << 30


class Biased(NamedTuple):
    """Who sees whom, and the numbers of a call.

    Args:
        sides: how many keys to the left and right of its own (the last query's own is the last key) a query sees; None:
            all of them.
        first, end: int32 [B], the keys of each row, or None.
        mask: bool [B or 1, HQ or 1, Sq, Sk], or None.
        dropout: the share of weights that is dropped.
    """

    scale: float
    sides: tuple[int | None, int | None] = (None, None)
    first: Tensor | None = None
    end: Tensor | None = None
    mask: Tensor | None = None
    dropout: float = 0.0


class Block(NamedTuple):
    """The shape of a program's tiles, and how it runs."""

    M: int
    N: int
    warps: int
    stages: int


#: by kernel, for heads of up to 64 and up to 128; shapes that FlashAttention-2 takes, not measured here yet
BLOCKS = {
    "forward": {64: Block(128, 64, 4, 3), 128: Block(128, 64, 8, 3)},
    "keys": {64: Block(64, 64, 4, 2), 128: Block(64, 64, 8, 2)},
    "queries": {64: Block(64, 64, 4, 3), 128: Block(64, 64, 8, 2)},
    "bias": {64: Block(64, 64, 4, 3), 128: Block(64, 64, 8, 2)},
}


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
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        B, HQ, Sq, _ = q.shape
        DV = v.shape[-1]
        out = q.new_empty(B, Sq, HQ, DV).transpose(1, 2)
        lse = torch.empty(B * HQ, Sq, dtype=torch.float32, device=q.device)
        seed = torch.empty((), dtype=torch.int64, device=q.device)
        if call.dropout:
            seed.random_()  # from the device's generator: nothing waits, and checkpoints find it again
        block = _block("forward", q, v)
        with _device(q):
            kernels.forward_kernel[triton.cdiv(Sq, block.M), B * HQ](
                *_tensors(q, k, v, bias, call, seed), out, lse, *_strides(q, k, v, bias, call), *out.stride()[:3],
                *_numbers(q, k, call), call.scale * float(LOG2E.value), call.dropout, **_constants(q, v, call, block),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, bias, out, lse, seed)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse, seed = ctx.saved_tensors
        call = ctx.call
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        B, HQ, Sq, _ = q.shape
        HKV, Sk, DV = k.shape[1], k.shape[2], v.shape[-1]
        delta = torch.empty_like(lse)
        wanted = ctx.needs_input_grad
        with _device(q):
            kernels.delta_kernel[triton.cdiv(Sq, 64), B * HQ](
                out, grad, delta, *out.stride()[:3], *grad.stride()[:3], HQ, Sq, DV=DV, BLOCK_DV=_width(DV), BLOCK_M=64
            )
            shared = _shared(bias, q)

            def launch(name: str, grid: tuple[int, int], *into: Tensor, **more: Any) -> None:
                kernel: Any = getattr(kernels, f"{name}_kernel")
                kernel[grid](
                    *_tensors(q, k, v, bias, call, seed), grad, lse, delta, *into, *_strides(q, k, v, bias, call),
                    *grad.stride()[:3], *shared, *_numbers(q, k, call), call.scale * float(LOG2E.value), call.scale,
                    call.dropout, **_constants(q, v, call, _block(name, q, v)), **more,
                )  # fmt: skip

            gk, gv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
            launch("keys", (triton.cdiv(Sk, _block("keys", q, v).N), B * HKV), gk, gv)
            gq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            gbias = None
            if wanted[3]:
                whole = bias.shape[2:] == (Sq, Sk)
                sizes = B // shared[0], HQ // shared[1], Sq, Sk
                # what comes to be summed up further stays in fp32
                gbias = torch.zeros(sizes, dtype=bias.dtype if whole else torch.float32, device=q.device)
            alone = gbias is not None and shared == (1, 1)
            into = gbias if alone and gbias is not None else gq
            launch("queries", (triton.cdiv(Sq, _block("queries", q, v).M), B * HQ), gq, into, WITH_BIAS=alone)
            if gbias is not None and not alone:
                block = _block("bias", q, v)
                tiles = triton.cdiv(Sq, block.M) * triton.cdiv(Sk, block.N)
                launch("bias", (tiles, gbias.shape[0] * gbias.shape[1]), gbias, gbias)
        return gq, gk, gv, None if gbias is None else gbias.sum_to_size(bias.shape).to(bias.dtype), None


def _shared(bias: Tensor, q: Tensor) -> tuple[int, int]:
    """How many rows and how many heads share a bias."""
    return (q.shape[0] if bias.shape[0] == 1 else 1), (q.shape[1] if bias.shape[1] == 1 else 1)


def _tensors(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, call: Biased, seed: Tensor) -> tuple[Tensor, ...]:
    """In the kernels' order; where there is none, one that is never read."""
    mask = q if call.mask is None else call.mask.view(torch.uint8)
    first = seed if call.first is None else call.first
    end = seed if call.end is None else call.end
    return q, k, v, bias, mask, first, end, seed


def _strides(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, call: Biased) -> tuple[int, ...]:
    """Of q, k and v without the last, of bias and mask 0 where they are broadcast."""
    out = [s for t in (q, k, v) for s in t.stride()[:3]]
    for t in (bias, call.mask):
        out += [0] * 4 if t is None else [0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    return tuple(out)


def _numbers(q: Tensor, k: Tensor, call: Biased) -> tuple[int, ...]:
    HQ, HKV, Sq, Sk = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    left, right = (_FAR if side is None else side for side in call.sides)
    return HQ, HQ // HKV, Sq, Sk, Sk - Sq, left, right


def _constants(q: Tensor, v: Tensor, call: Biased, block: Block) -> dict[str, Any]:
    D, DV = q.shape[-1], v.shape[-1]
    return {
        "D": D, "DV": DV, "BLOCK_D": _width(D), "BLOCK_DV": _width(DV), "BLOCK_M": block.M, "BLOCK_N": block.N,
        "MASK": call.mask is not None, "BOUNDED": call.first is not None, "DROPOUT": call.dropout > 0.0,
        "PRECISION": "ieee", "num_warps": block.warps, "num_stages": block.stages,
    }  # fmt: skip


def _width(D: int) -> int:
    return max(16, int(triton.next_power_of_2(D)))


def _block(name: str, q: Tensor, v: Tensor) -> Block:
    block = BLOCKS[name][64 if max(q.shape[-1], v.shape[-1]) <= 64 else 128]
    return block if q.dtype.itemsize == 2 else Block(min(block.M, 64), 32, block.warps, 1)
