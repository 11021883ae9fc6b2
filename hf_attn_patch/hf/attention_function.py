"""The attention function that is registered with transformers under the name ``hf_attn_patch``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.attn import memo
from hf_attn_patch.attn.choice import asked_for
from hf_attn_patch.attn.dispatch import attend, facts_of, known_calls, remember_call
from hf_attn_patch.attn.visibility import full
from hf_attn_patch.compat.batching import layer_writes_pages
from hf_attn_patch.compat.cache_keyword import is_paged
from hf_attn_patch.compat.torch import any_autocast, has_forward_hooks
from hf_attn_patch.compat.transformers import output_collector
from hf_attn_patch.errors import AttentionError

from .call_visibility import from_borders, from_carrier, from_mask, from_positions, positions_in
from .mask_pattern import of_carrier

NAME = "hf_attn_patch"
#: keyword arguments that change which keys are seen or how they are weighed, and that no backend here knows
UNKNOWN = frozenset({"indices", "block_indices", "head_mask", "block_mask", "score_mod", "mask_mod", "alibi", "sinks"})
#: a cache by the names of older transformers; one that arrives here was not taken by the layer
UNTAKEN = frozenset({"past_key_values", "past_key_value", "layer_past"})
#: set on modules by :func:`enable` with a backend
BACKEND_ATTRIBUTE = "_hf_attn_backend"
_collector = output_collector()


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool | None = None,
    cache: Any = None,
    deterministic: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query [B, HQ, Sq, D], key [B, HKV, Sk, D], value [B, HKV, Sk, Dv].

    The parameter names are transformers' own (some families pass them by keyword).

    Returns:
        out [B, Sq, HQ, Dv], and the weights [B, HQ, Sq, Sk] if ``output_attentions``, else None.

    Raises:
        AttentionError: a request that nothing here can run exactly.
    """
    if kwargs and not (UNKNOWN.isdisjoint(kwargs) and UNTAKEN.isdisjoint(kwargs)):
        _refuse_unknown(module, kwargs)
    if cache is not None or (kwargs and layer_writes_pages(kwargs)):
        from .continuous_batching import paged_forward

        if cache is not None and not is_paged(cache):
            _refuse_cache(module, "cache", cache)
        return paged_forward(
            module,
            query,
            key,
            value,
            cache,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
            **kwargs,
        )
    tracing = torch.compiler.is_compiling()
    weights = bool(output_attentions) or (
        (_may_be_collected(module) if tracing else _collector.get() is not None) and _weights_are_collected()
    )
    name = module.__dict__.get(BACKEND_ATTRIBUTE)
    call: Any = None
    plain = attention_mask is None and position_bias is None and cu_seq_lens_q is None
    if plain and not tracing and type(query) is Tensor:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
        if (position_ids is None or not causal or query.shape[2] == 1) and not any_autocast():
            # nothing but numbers: decoding, encoders without padding
            name = asked_for() if name is None else name
            facts = facts_of(query, key, value, softcap, s_aux, None, dropout, weights, bool(deterministic), name)
            call = (facts, key.dtype, value.dtype, bool(causal), sliding_window, scaling, softcap, dropout)
            known = known_calls.get(call)
            if known is not None:
                operands = known.operands
                assert operands is not None
                if s_aux is not None:
                    operands = operands._replace(sinks=s_aux)
                out, found = known.run(query, key, value, known.request, operands)
                return out.transpose(1, 2).contiguous(), found
    if not query.dtype == key.dtype == value.dtype or (
        query.dtype is torch.float32 and (tracing or any_autocast()) and torch.is_autocast_enabled(query.device.type)
    ):
        query, key, value = _one_dtype(module, query, key, value)
    if not tracing:
        memo.asks(module)
    bias = position_bias
    if attention_mask is None:
        # the modules that don't say are those of encoders, to whom no mask means that all is seen
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
        window = (None, None) if sliding_window is None or not causal else (sliding_window - 1, None)
        if cu_seq_lens_q is not None:
            layout = from_borders(query, key, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, causal, window)
        else:
            layout = from_positions(query, key, bool(causal), window, position_ids, tracing)
    elif attention_mask.dtype is torch.int32:
        pattern = None if cu_seq_lens_q is None else of_carrier(attention_mask)
        if cu_seq_lens_q is not None and pattern is not None and pattern.keys is None and pattern.chunk is None:
            # borders that are given need not be looked for in the positions
            rule = pattern.causal, pattern.window
            layout = from_borders(query, key, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, *rule)
        else:
            if cu_seq_lens_q is not None:
                position_ids = positions_in(cu_seq_lens_q, query, position_ids)
            layout = from_carrier(query, key, attention_mask, position_ids)
    elif attention_mask.dtype is torch.bool or attention_mask.dtype is torch.uint8:
        if cu_seq_lens_q is not None:
            position_ids = positions_in(cu_seq_lens_q, query, position_ids)
        layout = from_mask(query, key, attention_mask, position_ids, tracing)
    elif attention_mask.is_floating_point():
        layout = full(query.shape[2], key.shape[2], False, (None, None), query.shape[0])
        if attention_mask.shape[-1] != key.shape[2]:
            attention_mask = attention_mask[..., : key.shape[2]]
        bias = attention_mask if bias is None else bias + attention_mask
    else:
        raise AttentionError(
            f"an attention mask of dtype {attention_mask.dtype} and shape {tuple(attention_mask.shape)}: "
            "pass a bool mask (True: may be seen) or a float mask (added to the scores)"
        )
    if bias is not None and bias.shape[-1] != key.shape[2] and bias.shape[-1] != 1:
        bias = bias[..., : key.shape[2]]
    out, found = attend(
        query,
        key,
        value,
        layout=layout,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        bias=bias,
        dropout=dropout,
        weights=weights,
        deterministic=bool(deterministic),
        name=name,
        tracing=tracing,
    )
    if call is not None:
        remember_call(call, facts, layout, scaling, softcap, dropout)
    return out.transpose(1, 2).contiguous(), found


def _refuse_cache(module: torch.nn.Module, name: str, cache: Any) -> None:
    raise AttentionError(
        f"{type(module).__name__} handed {name!r} ({type(cache).__name__}) on to the attention function instead of "
        "filling it, so later steps would not see these keys: the layer's forward has to take the cache by the name "
        'that this transformers gives it ("past_key_values" up to 5.23, "cache" from 5.24) and update it; until then '
        "run the model with use_cache=False"
    )


def _refuse_unknown(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    for name in sorted(UNTAKEN.intersection(kwargs)):
        if kwargs[name] is not None:
            _refuse_cache(module, name, kwargs[name])
    for name in sorted(UNKNOWN.intersection(kwargs)):
        if kwargs[name] is not None:
            raise AttentionError(
                f"{type(module).__name__} passes {name!r}, which selects or weighs keys in a way that hf_attn_patch "
                'does not know; load this model with attn_implementation="eager"'
            )


def _may_be_collected(module: torch.nn.Module) -> bool:
    """While tracing: whether to look for a collector. Outside the forward that opens one, dynamo cannot look (it breaks
    the graph at each layer); there only hooks can collect, and they break it themselves."""
    return bool(_collector.compiling or has_forward_hooks(module))


def _weights_are_collected() -> bool:
    """Whether transformers' hooks collect attention weights: some families keep ``output_attentions`` to themselves."""
    collected = _collector.get()
    return bool(collected) and any("attentions" in key for key in collected)


def _one_dtype(module: torch.nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the dtype that a matmul would take (as eager does); otherwise different dtypes are an error."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(t if t.dtype is torch.float64 else t.to(dtype) for t in tensors)
    raise AttentionError(
        f"{type(module).__name__} gives query, key and value as {', '.join(str(t.dtype) for t in tensors)}; "
        "run it under torch.autocast, or load the model in one dtype"
    )
