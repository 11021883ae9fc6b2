"""What several backends do to their operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.layout import Layout


def cut(layout: Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
    """K and V [B, HKV, Sk, D] without the keys outside ``layout.start`` and ``layout.stop`` (views)."""
    if layout.whole:
        return tensors
    return tuple(t[:, :, layout.start : layout.stop] for t in tensors)


def cut_bias(layout: Layout, bias: Tensor) -> Tensor:
    """The bias [..., Sk] for the keys that :func:`cut` leaves."""
    if bias.shape[-1] == 1 or layout.whole:
        return bias
    return bias[..., layout.start : layout.stop]


def without_dead_keys(layout: Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
    """K and V (already cut) with zeros where no query looks, so that NaN or infinity in padding cannot leak."""
    dead = layout.dead_keys(tensors[0].device)
    if dead is None:
        return tensors
    return tuple(t.masked_fill(dead[:, None, :, None], 0) for t in tensors)


def rescale_by_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Let a sink logit join each row's softmax: ``out * exp(lse - logaddexp(lse, sink))``.

    Args:
        out: [B, HQ, Sq, Dv]. lse: fp32 [B, HQ, Sq]. sinks: [HQ].
    """
    sink = sinks.to(lse.dtype)[None, :, None]
    return (out * torch.sigmoid(lse - sink)[..., None]).to(out.dtype)


class SinkGradient(torch.autograd.Function):
    """:func:`rescale_by_sinks` over a kernel whose backward takes ``(grad, out, lse)``, with the sinks' gradient.

    Softmax with a sink is softmax over one more key of value zero, so the kernel's own backward is right when it is
    handed the rescaled output and the log-sum-exp that includes the sink; and ``dsink = -sum(p_sink * dO . out)``.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, kernel: Any) -> Tensor:
        """``kernel.forward(q, k, v) -> (out, lse, state)``, ``kernel.backward(grad, q, k, v, out, lse, state)``."""
        out, lse, state = kernel.forward(q, k, v)
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
        out = (out * torch.exp(lse - total)[..., None]).to(out.dtype)
        ctx.save_for_backward(q, k, v, out, total, sinks)
        ctx.kernel, ctx.state = kernel, state
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """Gradients of q, k, v and the sinks."""
        q, k, v, out, total, sinks = ctx.saved_tensors
        grads = ctx.kernel.backward(grad, q, k, v, out, total, ctx.state)
        weight = torch.exp(sinks.to(total.dtype)[None, :, None] - total)
        dsinks = -(weight * (grad.to(total.dtype) * out.to(total.dtype)).sum(-1)).sum((0, 2))
        return (*grads, dsinks.to(sinks.dtype), None)
