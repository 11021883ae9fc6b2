"""What several backends do to their operands."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from hf_attn_patch.attn.visibility import Visibility


def installed(module: str) -> bool:
    """Whether a module of another package can be found; its parent package is imported for that."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def cut(seen: Visibility, *tensors: Tensor) -> tuple[Tensor, ...]:
    """K and V [B, HKV, Sk, D] without the keys outside ``seen.start`` and ``seen.stop`` (views)."""
    if seen.whole:
        return tensors
    return tuple(t[:, :, seen.start : seen.stop] for t in tensors)


def cut_bias(seen: Visibility, bias: Tensor) -> Tensor:
    """The bias [..., Sk] for the keys that :func:`cut` leaves."""
    if bias.shape[-1] == 1 or seen.whole:
        return bias
    return bias[..., seen.start : seen.stop]


def as_dtype(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias in ``dtype``. What is finite stays so: the lowest of fp32, which hides a key, would round to -inf."""
    if bias.dtype == dtype or torch.finfo(bias.dtype).min >= torch.finfo(dtype).min:
        return bias.to(dtype)
    lowest = torch.finfo(dtype).min
    return bias.to(dtype).masked_fill((bias < lowest) & (bias > -torch.inf), lowest)


def rescale_by_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Let a sink logit join each row's softmax: ``out * exp(lse - logaddexp(lse, sink))``.

    Args:
        out: [B, HQ, Sq, Dv]. lse: fp32 [B, HQ, Sq]. sinks: [HQ].
    """
    sink = sinks.to(lse.dtype)[None, :, None]
    return (out * torch.sigmoid(lse - sink)[..., None]).to(out.dtype)
