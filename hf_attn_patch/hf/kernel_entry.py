"""The decode kernel for transformers without this package: what ``attn_implementation="owner/name"`` calls.

``hf-attn push-kernel`` writes this file and what it imports as a repository for the package ``kernels``, in which this
is the ``__init__``. Few queries without gradients take the kernel; everything else is torch's own function, or, where
that has no softcap and no sinks, plain attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_attn_patch.attn.devices import HAS_TRITON, device_of
from hf_attn_patch.attn.kernels.decode_operands import why_not
from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_reference

if HAS_TRITON:
    from hf_attn_patch.attn.kernels.decode import grouped_decode, grouped_decode_paged

    __all__ = ["flash_attn_forward", "grouped_decode", "grouped_decode_paged", "supports_flash_attn"]
else:  # a machine without a GPU
    __all__ = ["flash_attn_forward", "supports_flash_attn"]

#: transformers asks for this name beside ``flash_attn_forward``, and then hands it masks as it does ``sdpa``
supports_flash_attn = True
#: the most queries of one call of the kernel
MAX_QUERIES = 16


def flash_attn_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, with the mask that ``sdpa`` gets.

    Args:
        query: [B, HQ, Sq, D]; key [B, HKV, Sk, D]; value [B, HKV, Sk, Dv], not repeated.
        attention_mask: [B, 1 or HQ, Sq, Sk], bool (True: seen) or float (added to the scores); None: causal as
            ``is_causal`` says, the last query beside the last key. Windows are in it.
        s_aux: [HQ] logits of sinks.
        position_bias: added to the scores, broadcastable to [B, HQ, Sq, Sk].

    Returns:
        [B, Sq, HQ, Dv] and None.

    Raises:
        ValueError: dropout together with softcap or sinks.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    is_bool = attention_mask is not None and attention_mask.dtype == torch.bool
    mask, bias = (attention_mask, position_bias) if is_bool else (None, attention_mask)
    if position_bias is not None and not is_bool:
        bias = position_bias if bias is None else bias + position_bias
    options: dict[str, Any] = {"scale": scale, "causal": causal, "mask": mask, "bias": bias, "softcap": softcap}
    if fits(query, key, value, dropout):
        out = grouped_decode(query, key, value, sinks=s_aux, **options)
        assert isinstance(out, Tensor)
    elif softcap is None and s_aux is None:
        out = _torch(query, key, value, scale, causal, mask, bias, dropout)
    elif dropout:
        raise ValueError("softcap and sinks together with dropout have no kernel here: set attention_dropout to 0")
    else:
        wide = (x.float() for x in (query, key, value))
        out = grouped_decode_reference(*wide, sinks=None if s_aux is None else s_aux.float(), **options)[0]
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def fits(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> bool:
    """Whether the kernel takes a call: few queries, no gradients, a GPU whose shared memory holds its tiles."""
    if query.shape[2] > MAX_QUERIES or dropout or "grouped_decode" not in __all__:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return False
    return why_not(device_of(query.device), query.dtype, query.shape[-1], value.shape[-1]) is None


def _torch(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None, bias: Tensor | None,
    dropout: float,
) -> Tensor:  # fmt: skip
    """torch's function; KV heads are repeated only under a mask, where its fast kernels know no groups."""
    Sq, Sk = query.shape[2], key.shape[2]
    if causal and Sq != Sk:  # torch puts the first query beside the first key
        mask = torch.ones(Sq, Sk, dtype=torch.bool, device=query.device).tril(Sk - Sq)
        causal = False
    if bias is not None:
        hidden = torch.finfo(query.dtype).min
        bias = bias.to(query.dtype)
        mask = bias if mask is None else torch.where(mask, bias, hidden)
    if mask is not None:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scale=scale, enable_gqa=mask is None
    )
