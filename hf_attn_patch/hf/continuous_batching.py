"""Continuous batching: transformers' paged cache, packed queries and keys by cumulative lengths.

``generate_batch`` runs a model with ``attn_implementation="hf_attn_patch"``, or one under ``override``, as it is
(:mod:`.compat.batching`). Up to transformers 5.23 the attention function writes to the cache, from 5.24 the layer does.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.attn.dispatch import attend
from hf_attn_patch.attn.visibility import packed
from hf_attn_patch.compat.batching import pages_of
from hf_attn_patch.errors import AttentionError

from .paged_decode import paged_decode


def paged_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    *,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Any,
    max_length_q: int | None = None,
    max_length_k: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, HQ, T, D], key and value [1, HKV, T, D] of this step -> (out [1, T, HQ, Dv], None).

    The cache writes the new keys and values and gives back those of every request in the step, one after another; None
    if the layer has had that done.
    """
    if cu_seq_lens_q is None:
        raise AttentionError("a paged cache came without cu_seq_lens_q, which say where each request begins")
    numbers = {name: kwargs.pop(name) for name in ("scaling", "sliding_window", "softcap", "sinks")}
    window = numbers.pop("sliding_window") or getattr(module, "sliding_window", None)
    kwargs |= {"cu_seq_lens_k": cu_seq_lens_k, "max_length_k": max_length_k}
    if cache is None or "kwargs" in inspect.signature(cache.update).parameters:
        key, value, pages = _updated(cache, module, key, value, kwargs)
        cu_k, max_k = kwargs["cu_seq_lens_k"], kwargs["max_length_k"]
    else:
        key, value, pages = _updated_by_index(cache, module, key, value, kwargs)
        kind = "sliding_attention" if window and pages is None else "full_attention"
        cu_k = cu_seq_lens_k[kind] if isinstance(cu_seq_lens_k, dict) else cu_seq_lens_k
        max_k = kwargs.get("max_seqlen_k", max_length_k)
        max_k = max_k[kind] if isinstance(max_k, dict) else max_k
        max_length_q = kwargs.get("max_seqlen_q", max_length_q)
    if pages is not None:
        if window:
            raise AttentionError(
                f"a block table came for a layer with a sliding window of {window}, and our kernel reads whole "
                "requests: set max_blocks_per_request=0 in the continuous batching config"
            )
        return paged_decode(query, key, value, *pages, cu_k, **numbers), None
    T, Tk = query.shape[2], key.shape[2]
    visibility = packed(
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
    scale = numbers.pop("scaling")
    out, _ = attend(query, key, value, visibility=visibility, scale=scale, **numbers)
    return out.transpose(1, 2).contiguous(), None


#: keys and values to attend to, or the pages (k, v, table) where they are read
Pages = tuple[Any, Any, Any]
Written = tuple[Tensor, Tensor, Pages | None]


def _updated(cache: Any, module: torch.nn.Module, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Written:
    """Newer caches change ``kwargs``; None is a cache that the layer has written."""
    if cache is not None:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    table = kwargs.get("block_table")
    return key, value, None if table is None else (kwargs["k_cache"], kwargs["v_cache"], table)


def _updated_by_index(
    cache: Any, module: torch.nn.Module, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> Written:
    """Older caches are told where to read and write."""
    if (table := kwargs.get("block_table")) is not None:
        return key, value, pages_of(cache, module.layer_idx, table)
    read, write = kwargs["read_index"], kwargs["write_index"]
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, read_index=read, write_index=write
    )
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None], None
