"""Cross-entropy and KL to a teacher, straight from hidden states: the logits never stand whole.

A batch of T = 32k tokens over V = 128k words has 17 GB of fp32 logits, as many again for their gradient, and as many
for the teacher's. Here hundreds or thousands of rows at a time are projected, turned into their gradient, and projected
back, so that what is kept is as large as the hidden states: [T, E] and, if the head is trained, [V, E]. On a GPU a
Triton kernel (kernels/loss.py) turns the rows; ``_plain_chunk`` is its plain truth, and what runs elsewhere.
The gradient with respect to the logits has a closed form, so it is taken in the forward pass (the idea of
Liger-Kernel's fused linear losses, arXiv 2410.10989): one projection fewer than recomputing in backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_attn_patch.attn.devices import HAS_TRITON

IGNORE = -100
#: elements of the largest matrix that a chunk makes: in fp32 (256 MB), and in fp16 or bf16 for the kernel (1 GB)
CHUNK_ELEMENTS, KERNEL_ELEMENTS = 2**26, 2**29


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: ``softcap(scale * (h @ weight.T) + bias)``.

    Args:
        weight: [V, E]; None where the "hidden states" already are logits.
        bias: [V] or None.
        scale: a factor on the product (Cohere, Granite, tied T5).
        softcap: ``c * tanh(x / c)`` on the logits (Gemma 2), or None.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def detach(self) -> Head:
        """The same head without gradients."""
        weight = None if self.weight is None else self.weight.detach()
        return Head(weight, None if self.bias is None else self.bias.detach(), self.scale, self.softcap)

    def product(self, hidden: Tensor) -> Tensor:
        """``hidden @ weight.T`` [T, V] in hidden's dtype."""
        return hidden if self.weight is None else hidden @ self.weight.to(hidden.dtype).T

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [T, V] of ``hidden`` [T, E]; the product itself is in hidden's dtype."""
        return self.finish(self.product(hidden))

    def finish(self, product: Tensor) -> Tensor:
        """fp32 logits out of ``product``: what the head does after it."""
        out = product.float() * self.scale if self.scale != 1.0 else product.float()
        if self.bias is not None:
            out = out + self.bias.float()
        return self.softcap * torch.tanh(out / self.softcap) if self.softcap else out


class LossSums(NamedTuple):
    """Sums over the tokens that have a label; divide by ``labels``, their number, for means.

    Only ``loss`` = ce_weight * ce + kl_weight * kl carries a gradient.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    labels: Tensor


def linear_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> LossSums:
    """``ce_weight * CE + kl_weight * tau^2 * KL(teacher || student)``, summed over tokens with a label.

    Args:
        hidden: [T, E] of the student, floating point.
        head: the student's head over V words.
        labels: [T], the word to predict at each row (already shifted), or -100.
        teacher_hidden: [T, E'] of the teacher; needed for KL.
        teacher_head: its head over the same V words.
        temperature: tau; both distributions are softened by it in KL (Hinton et al. 2015, arXiv 1503.02531).
        chunk: rows at a time; by default as many as keep a chunk's logits at 256 MB (CPU), or on a GPU, where the
            kernel leaves them in hidden's dtype, at 1 GB.

    Returns:
        fp32 scalars; ``kl`` includes the factor tau^2.

    Raises:
        ValueError: shapes do not go together.
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"hidden must be [T, E] and labels [T], not {tuple(hidden.shape)} and {tuple(labels.shape)}")
    V = hidden.shape[1] if head.weight is None else head.weight.shape[0]
    if teacher_hidden is not None and teacher_head is not None:
        teacher_V = teacher_hidden.shape[1] if teacher_head.weight is None else teacher_head.weight.shape[0]
        if teacher_V != V or len(teacher_hidden) != len(hidden):
            raise ValueError(f"a teacher of {teacher_V} words cannot teach a student of {V}")
        teacher = (teacher_hidden.detach(), teacher_head.detach())
    elif kl_weight:
        raise ValueError("KL needs teacher_hidden and teacher_head")
    else:
        teacher = None
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # norms with fp32 weights make fp32 hidden states; the product is for bf16
        hidden = hidden.to(torch.get_autocast_dtype(device))
        if teacher is not None:
            teacher = (teacher[0].to(hidden.dtype), teacher[1])
    fused = hidden.is_cuda and HAS_TRITON and hidden.dtype != torch.float64
    rows = chunk or max(1, (2 * KERNEL_ELEMENTS // hidden.element_size() if fused else CHUNK_ELEMENTS) // V)
    if rows > 128 and chunk is None:
        rows -= rows % 128  # whole tiles for the products
    weights = (ce_weight, kl_weight, temperature)
    return LossSums(*_LinearLoss.apply(hidden, head.weight, head.bias, head, labels, teacher, weights, rows, fused))


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        teacher: tuple[Tensor, Head] | None,
        weights: tuple[float, float, float],
        rows: int,
        fused: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # summed over chunks in fp32: a bf16 sum of hundreds of chunks would lose the small ones
        d_weight = _fp32_zeros(weight) if ctx.needs_input_grad[1] else None
        d_bias = _fp32_zeros(bias) if ctx.needs_input_grad[2] else None
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        student = _cast(head, hidden.dtype)
        if teacher is not None:
            teacher = (teacher[0], _cast(teacher[1], teacher[0].dtype))
        wanted = d_hidden is not None or d_weight is not None or d_bias is not None
        chunk_of = _fused_chunk if fused else _plain_chunk
        with torch.autocast(hidden.device.type, enabled=False):
            starts = range(0, max(1, len(hidden)), rows)  # of no tokens there is one chunk, an empty one
            for h, y, at in zip(hidden.split(rows), labels.split(rows), starts, strict=True):
                told = None if teacher is None else (teacher[1].product(teacher[0][at : at + rows]), teacher[1])
                part, grad = chunk_of(student.product(h), student, y, told, weights, wanted)
                sums += part
                if grad is None:
                    continue
                if d_bias is not None:
                    d_bias += grad.sum(0, dtype=torch.float32) / head.scale
                if d_hidden is not None:
                    d_hidden[at : at + rows] = grad if student.weight is None else grad @ student.weight
                if d_weight is not None:
                    _add_product(d_weight, grad.T, h)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        ce, kl = sums.unbind()
        # a weight of 0 switches a part off altogether: 0 * inf must not spoil the sum
        loss = sum((w * s for w, s in zip(weights, (ce, kl), strict=False) if w), torch.zeros_like(ce))
        count = (labels != IGNORE).sum().float()
        ctx.mark_non_differentiable(ce, kl, count)
        return loss, ce, kl, count

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        out_hidden = None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype)
        out_weight, out_bias = (
            None if d is None else torch.mul(d, d_loss, out=torch.empty_like(d, dtype=dtype))
            for d, dtype in zip((d_weight, d_bias), ctx.dtypes, strict=True)
        )
        return out_hidden, out_weight, out_bias, None, None, None, None, None, None


def _cast(head: Head, dtype: torch.dtype) -> Head:
    weight = None if head.weight is None else head.weight.to(dtype)
    return Head(weight, head.bias, head.scale, head.softcap)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` where ``total`` is fp32 and the product may be of fp16 or bf16."""
    if total.is_cuda and a.dtype != torch.float32:  # rounded once, inside the product
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total += a @ b


def _plain_chunk(
    product: Tensor, head: Head, labels: Tensor, told: tuple[Tensor, Head] | None,
    weights: tuple[float, float, float], wanted: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The sums (CE, tau^2 KL) [2] of some rows, and the gradient with respect to ``product``, in its dtype."""
    logits = head.finish(product)
    part, grad = chunk_loss(logits, labels, None if told is None else told[1].finish(told[0]), weights, wanted)
    if grad is None:
        return part, None
    if head.softcap:
        grad *= 1 - (logits / head.softcap) ** 2
    return part, (grad * head.scale if head.scale != 1.0 else grad).to(product.dtype)


def _fused_chunk(
    product: Tensor, head: Head, labels: Tensor, told: tuple[Tensor, Head] | None,
    weights: tuple[float, float, float], wanted: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``_plain_chunk`` by the kernel: the gradient is written over ``product``, unless that is the caller's own."""
    from hf_attn_patch.attn.kernels.loss import RawLogits, rows_loss

    grad = None if not wanted else product if head.weight is not None else torch.empty_like(product)
    teacher = None if told is None else RawLogits(told[0], told[1].bias, told[1].scale, told[1].softcap)
    student = RawLogits(product, head.bias, head.scale, head.softcap)
    return rows_loss(student, labels, teacher, weights, IGNORE, grad), grad


def _fp32_zeros(like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.zeros_like(like, dtype=torch.float32)


def chunk_loss(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, weights: tuple[float, float, float], wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """The sums (CE, tau^2 KL) [2] of some rows, and the weighted gradient [T, V] with respect to their logits.

    With p = softmax(z): dCE/dz = p - onehot. With s, t = softmax(z / tau), softmax(z_teacher / tau):
    d(tau^2 KL(t || s))/dz = tau (s - t).
    """
    ce_weight, kl_weight, tau = weights
    valid = labels != IGNORE
    log_p = torch.log_softmax(logits, dim=-1)
    index = labels.clamp(min=0)[:, None]
    zero = logits.new_zeros(())
    ce = torch.where(valid, -log_p.gather(1, index)[:, 0], zero).sum()
    grad = None
    if wanted and ce_weight:
        grad = log_p.exp()
        grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
        grad *= ce_weight
    kl = zero
    if teacher is not None:
        log_s = log_p if tau == 1.0 else torch.log_softmax(logits / tau, dim=-1)
        log_t = torch.log_softmax(teacher if tau == 1.0 else teacher / tau, dim=-1)
        t = log_t.exp()
        # t = 0 contributes nothing, also where a log is -inf; a NaN must be seen
        row = torch.where(t != 0, t * (log_t - log_s), zero).sum(-1)
        kl = tau * tau * torch.where(valid, row, zero).sum()
        if wanted and kl_weight:
            d_kl = (log_s.exp() - t) * (kl_weight * tau)
            grad = d_kl if grad is None else grad + d_kl
    if wanted:
        grad = torch.zeros_like(logits) if grad is None else grad.masked_fill_(~valid[:, None], 0.0)
    return torch.stack([ce, kl]), grad
