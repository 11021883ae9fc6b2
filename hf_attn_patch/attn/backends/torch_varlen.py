"""FlashAttention-2 code inside torch, over cumulative lengths: windows, padding and packed documents.

It is called through ATen, because the public ``torch.nn.attention.varlen.varlen_attn`` has no dropout, and no grouping
in torch 2.11.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from hf_attn_patch.attn.devices import lacks, needs_nvidia, no_wide_flash_backward
from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.attn.visibility import Full
from hf_attn_patch.compat.torch import varlen_attention_op

from ._common import cut, rescale_by_sinks
from ._varlen import refuses_common, run_varlen


def missing() -> str | None:
    """Why it cannot run here, or None."""
    return lacks(80)


def refuses(request: AttentionRequest) -> str | None:
    """Why not, or None."""
    if reason := refuses_common(request, 256, 1) or needs_nvidia(request, 80):
        return reason
    if request.grad and (reason := no_wide_flash_backward(request, request.head_dim, request.dropout)):
        return reason
    if request.softcap:
        return "torch's FlashAttention has no softcap"
    if request.sinks and request.grad:
        return "its backward drops the gradient of the log-sum-exp that sinks need"
    if request.deterministic and request.grad:
        return "its backward is not deterministic"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands) -> tuple[Tensor, None]:
    """q [B, HQ, Sq, D], k [B, HKV, Sk, D], v [B, HKV, Sk, D] -> (out [B, HQ, Sq, D], None)."""
    seen, D = operands.visibility, q.shape[-1]
    left, right = seen.sides

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int
    ) -> Tensor:
        out, lse = varlen_attention_op(
            q,
            k,
            v,
            cu_q,
            cu_k,
            max_q,
            max_k,
            operands.dropout,
            left is None and right == 0,
            False,
            scale=operands.scale,
            window_size_left=None if left is None and right in (0, None) else (-1 if left is None else left),
            window_size_right=None if left is None and right in (0, None) else (-1 if right is None else right),
        )[:2]
        if operands.sinks is not None:
            if lse.dim() == 2:  # [HQ, T]
                return rescale_by_sinks(out.transpose(0, 1)[None], lse[None], operands.sinks)[0].transpose(0, 1)
            return rescale_by_sinks(out.transpose(1, 2), lse, operands.sinks).transpose(1, 2)
        return out

    if D % 8:
        q, k, v = (F.pad(t, (0, -D % 8)) for t in (q, k, v))
    if isinstance(seen, Full):
        k, v = cut(seen, k, v)
        args = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = kernel(*args, None, None, q.shape[2], k.shape[2]).transpose(1, 2)
    else:
        out = run_varlen(q, k, v, operands, kernel)
    return (out[..., :D] if D % 8 else out), None
