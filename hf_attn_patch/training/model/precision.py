"""bf16 between layers, fp32 where it counts: weights, optimiser, gradients' sums, the inside of norms, the loss.

Autocast alone makes products in bf16 and leaves the rest to type promotion: the embedding's fp32 weights start an fp32
residual stream, every fp32 norm goes on with it, and each product casts its input anew. On one H200, 1B parameters,
the casts and the wider elementwise operations were a fifth of a step. With the outputs of embeddings and norms
rounded, everything between layers is bf16, as in a model loaded in bf16 and as under FSDP2's MixedPrecisionPolicy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .trainable import is_projection


def round_between_layers(model: nn.Module) -> None:
    """Under bf16 autocast, the modules that hold weights of their own and are no products return bf16 for fp32.

    Their forwards compute as before, with their fp32 weights; gradients pass through the rounding unchanged.

    >>> norm = nn.Sequential(nn.LayerNorm(4))
    >>> round_between_layers(norm)
    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     norm(torch.ones(2, 4)).dtype
    torch.bfloat16
    >>> norm(torch.ones(2, 4)).dtype
    torch.float32
    """
    for module in model.modules():
        leaf = next(module.children(), None) is None and next(module.parameters(recurse=False), None) is not None
        if leaf and not is_projection(module):
            module.register_forward_hook(_rounded)


def _rounded(_: nn.Module, _args: Any, out: Any) -> Any:
    if isinstance(out, Tensor) and out.dtype is torch.float32:
        device = out.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16:
            return out.bfloat16()
    return out


def keep_fp32_in_fsdp2(plugin: Any) -> None:
    """Weights gathered in bf16, gradients summed over processes in fp32, and the loss left as it is.

    accelerate's own policy rounds the sums of gradients to bf16, and the outputs of the outermost forward too: here
    these are sums of losses, which would lose all but three digits.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
