"""Cross-entropy and KL of whole rows of logits, with their gradient written where the logits were.

The plain truth is ``_plain_chunk`` of losses/chunked.py, which goes over a matrix [T, V] in fp32 some fifteen times.
Here one program takes a row: it reads the logits twice, once for the log-sum-exp (online, as in Milakov and Gimelshein
2018, arXiv 1805.02867) and once to write the gradient, in the logits' own dtype. Nothing else is as large as they are.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_kernel import _tanh

#: at most so many words at a time, and words a warp
BLOCK, A_WARP = 4096, 512


class RawLogits(NamedTuple):
    """Logits before their head's last steps: ``softcap(scale * x + bias)``.

    Args:
        x: [T, V], floating point, its rows contiguous.
        bias: [V] or None.
    """

    x: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@triton.jit
def _load(x, bias, at, valid, scale, cap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """Finished logits of one block in fp32; -inf beyond the vocabulary."""
    z = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) * scale
    if HAS_BIAS:
        z += tl.load(bias + at, mask=valid, other=0.0).to(tl.float32)
    if CAPPED:
        z = _tanh(z / cap) * cap
    return tl.where(valid, z, float("-inf"))


@triton.jit
def _add_block(z, largest, total, softened, cold, SOFTENED: tl.constexpr):
    """The running maximum, sum of exp(z - max) and, if softened, of exp((z - max) * cold)."""
    new = tl.maximum(largest, tl.max(z, 0))
    base = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is NaN
    total = total * tl.exp(largest - base) + tl.sum(tl.exp(z - base), 0)
    if SOFTENED:
        softened = softened * tl.exp((largest - base) * cold) + tl.sum(tl.exp((z - base) * cold), 0)
    return new, total, softened


@triton.jit
def _rows_kernel(
    x_ptr, bias_ptr, teacher_ptr, teacher_bias_ptr, labels_ptr, grad_ptr, ce_ptr, kl_ptr,
    x_stride, teacher_stride, grad_stride, V,
    scale, cap, teacher_scale, teacher_cap, ce_weight, kl_weight, cold, ignore,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, TAUGHT: tl.constexpr, DISTILLED: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_CAPPED: tl.constexpr, SOFTENED: tl.constexpr, WANTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # cold is 1 / tau
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    x, grad, teacher = x_ptr + row * x_stride, grad_ptr + row * grad_stride, teacher_ptr + row * teacher_stride
    words = tl.arange(0, BLOCK)
    if label == ignore:
        if WANTED:
            for start in range(0, V, BLOCK):
                at = start + words
                tl.store(grad + at, tl.zeros([BLOCK], tl.float32).to(grad_ptr.dtype.element_ty), mask=at < V)
        tl.store(ce_ptr + row, 0.0)
        tl.store(kl_ptr + row, 0.0)
        return

    top = float("-inf")
    sum_p = 0.0
    sum_s = 0.0
    top_t = float("-inf")
    sum_t = 0.0
    softened_t = 0.0
    for start in range(0, V, BLOCK):
        at = start + words
        z = _load(x, bias_ptr, at, at < V, scale, cap, HAS_BIAS, CAPPED)
        top, sum_p, sum_s = _add_block(z, top, sum_p, sum_s, cold, SOFTENED)
        if TAUGHT:
            t = _load(teacher, teacher_bias_ptr, at, at < V, teacher_scale, teacher_cap, TEACHER_BIAS, TEACHER_CAPPED)
            top_t, sum_t, softened_t = _add_block(t, top_t, sum_t, softened_t, cold, SOFTENED)
    lse = top + tl.log(sum_p)
    soft_lse = top * cold + tl.log(sum_s) if SOFTENED else lse
    teacher_lse = top_t * cold + tl.log(softened_t) if SOFTENED else top_t + tl.log(sum_t)

    said = 0.0  # the label's logit
    kl = 0.0
    for start in range(0, V, BLOCK):
        at = start + words
        valid = at < V
        z = _load(x, bias_ptr, at, valid, scale, cap, HAS_BIAS, CAPPED)
        is_label = at == label
        said += tl.sum(tl.where(is_label, z, 0.0), 0)
        p = tl.exp(z - lse)
        d = ce_weight * (p - tl.where(is_label, 1.0, 0.0))
        if TAUGHT:
            t = _load(teacher, teacher_bias_ptr, at, valid, teacher_scale, teacher_cap, TEACHER_BIAS, TEACHER_CAPPED)
            log_s, log_t = z * cold - soft_lse, t * cold - teacher_lse
            q = tl.exp(log_t)
            # a word that the teacher rules out contributes nothing, also where a log is -inf
            kl += tl.sum(tl.where(valid & (q != 0.0), q * (log_t - log_s), 0.0), 0)
            if DISTILLED:
                d += kl_weight * ((tl.exp(log_s) if SOFTENED else p) - q) / cold
        if WANTED:
            if CAPPED:
                d *= 1 - (z / cap) * (z / cap)
            tl.store(grad + at, (d * scale).to(grad_ptr.dtype.element_ty), mask=valid)
    # a label beyond the vocabulary must not pass for one that was predicted
    tl.store(ce_ptr + row, tl.where((label >= 0) & (label < V), lse - said, float("nan")))
    tl.store(kl_ptr + row, kl / (cold * cold))


def rows_loss(
    logits: RawLogits,
    labels: Tensor,
    teacher: RawLogits | None,
    weights: tuple[float, float, float],
    ignore: int,
    grad: Tensor | None,
) -> Tensor:
    """The sums (CE, tau^2 KL) over the rows with a label, fp32 [2]; the weighted gradient goes into ``grad``.

    Args:
        labels: [T]; ``ignore`` where there is nothing to predict, and whatever such a row holds counts for nothing.
        teacher: its logits over the same words, or None.
        weights: of CE, of KL, and tau.
        grad: [T, V] for the gradient with respect to ``logits.x``, which it may be itself; None if it is not wanted.
    """
    T, V = logits.x.shape
    ce, kl = torch.empty(2, T, dtype=torch.float32, device=labels.device).unbind()
    ce_weight, kl_weight, tau = weights
    told = logits if teacher is None else teacher
    out = logits.x if grad is None else grad
    for matrix in (logits.x, told.x, out):
        if matrix.shape != (T, V) or (V > 1 and matrix.stride(1) != 1):
            raise ValueError(f"logits and gradient must be [{T}, {V}] with contiguous rows")
    block = min(BLOCK, triton.next_power_of_2(V))
    with _device(labels):
        _rows_kernel[(T,)](
            logits.x, logits.x if logits.bias is None else logits.bias.contiguous(),
            told.x, told.x if told.bias is None else told.bias.contiguous(), labels, out, ce, kl,
            logits.x.stride(0), told.x.stride(0), out.stride(0), V,
            logits.scale, logits.softcap or 1.0, told.scale, told.softcap or 1.0, ce_weight, kl_weight, 1.0 / tau,
            ignore, HAS_BIAS=logits.bias is not None, CAPPED=bool(logits.softcap), TAUGHT=teacher is not None,
            DISTILLED=kl_weight != 0.0, TEACHER_BIAS=told.bias is not None, TEACHER_CAPPED=bool(told.softcap),
            SOFTENED=tau != 1.0, WANTED=grad is not None, BLOCK=block, num_warps=max(1, min(32, block // A_WARP)),
        )  # fmt: skip
    return torch.stack([ce.sum(), kl.sum()])


def _device(tensor: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
