"""Continuous batching: transformers' paged cache, packed queries and keys by cumulative lengths.

In transformers 5.19 and later the manager takes only models whose implementation is called "sdpa" (or a flash one): use
:func:`hf_attn_patch.override`. Up to 5.18 it looks up ``paged|hf_attn_patch``, which is registered too.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.attn.dispatch import attend
from hf_attn_patch.attn.request import AttentionError
from hf_attn_patch.attn.visibility import packed

from .paged_decode import paged_decode, pages_of


def paged_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    *,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Any,
    max_length_q: int | None = None,
    max_length_k: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, HQ, T, D], key and value [1, HKV, T, D] of this step -> (out [1, T, HQ, Dv], None).

    The cache writes the new keys and values and gives back those of every request in the step, one after another.
    """
    if cu_seq_lens_q is None:
        raise AttentionError("a paged cache came without cu_seq_lens_q, which say where each request begins")
    numbers: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    if "kwargs" in inspect.signature(cache.update).parameters:
        changed = {**kwargs, "cu_seq_lens_k": cu_seq_lens_k, "max_length_k": max_length_k}
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=changed)
        if (table := changed.get("block_table")) is not None:
            pages = changed["k_cache"], changed["v_cache"], table
            return paged_decode(query, key, value, *pages, changed["cu_seq_lens_k"], **numbers), None
        cu_k, max_k = changed["cu_seq_lens_k"], changed["max_length_k"]
    elif (table := kwargs.get("block_table")) is not None:
        lengths = cu_seq_lens_k["full_attention"] if isinstance(cu_seq_lens_k, dict) else cu_seq_lens_k
        pages = pages_of(cache, module.layer_idx, table)
        return paged_decode(query, key, value, *pages, lengths, **numbers), None
    else:
        key, value = cache.update(
            key_states=key,
            value_states=value,
            layer_idx=module.layer_idx,
            read_index=kwargs["read_index"],
            write_index=kwargs["write_index"],
        )
        key, value = (t.transpose(0, 1)[None] for t in (key, value))
        kind = "sliding_attention" if sliding_window or getattr(module, "sliding_window", None) else "full_attention"
        cu_k = cu_seq_lens_k[kind] if isinstance(cu_seq_lens_k, dict) else cu_seq_lens_k
        max_k = kwargs.get("max_seqlen_k", max_length_k)
        max_k = max_k[kind] if isinstance(max_k, dict) else max_k
        max_length_q = kwargs.get("max_seqlen_q", max_length_q)
    window = sliding_window or getattr(module, "sliding_window", None)
    T, Tk = query.shape[2], key.shape[2]
    layout = packed(
        1,
        T,
        Tk,
        cu_seq_lens_q,
        cu_k,
        T if max_length_q is None else int(max_length_q),
        Tk if max_k is None else int(max_k),
        True,
        (None if not window else window - 1, None),
    )
    out, _ = attend(query, key, value, layout=layout, scale=scaling, softcap=softcap, sinks=sinks)
    return out.transpose(1, 2).contiguous(), None
