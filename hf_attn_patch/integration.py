"""What is registered with transformers under the name ``hf_attn_patch``, and how to switch it on and off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils.output_capturing import _active_collector

from .dispatch import attend, facts_of, known_calls, prepare, remember_call
from .layout import DENSE, Layout, full, packed, remembered_full
from .pattern import Pattern, dense_from_carrier, of_carrier
from .request import AttentionError, Operands

NAME = "hf_attn_patch"
#: keyword arguments that change which keys are seen or how they are weighed, and that no backend here knows
UNKNOWN = frozenset({"indices", "block_indices", "head_mask", "block_mask", "score_mod", "mask_mod", "alibi", "sinks"})
#: set on modules by :func:`enable` with a backend
BACKEND_ATTRIBUTE = "_hf_attn_backend"
_KEPT = "_hf_attn_layout"
_any_autocast = torch._C._is_any_autocast_enabled  # a tenth of the time of asking for one device


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
    if kwargs and not UNKNOWN.isdisjoint(kwargs):
        _refuse_unknown(module, kwargs)
    if cache is not None:
        from .paged import paged_forward

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
        (_may_be_collected(module) if tracing else _active_collector.get() is not None) and _weights_are_collected()
    )
    name = module.__dict__.get(BACKEND_ATTRIBUTE)
    call: Any = None
    if attention_mask is None and position_bias is None and cu_seq_lens_q is None and not tracing:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
        if (position_ids is None or not causal or query.shape[2] == 1) and not _any_autocast():
            # nothing but numbers: decoding, encoders without padding
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
        query.dtype is torch.float32 and (tracing or _any_autocast()) and torch.is_autocast_enabled(query.device.type)
    ):
        query, key, value = _one_dtype(module, query, key, value)
    bias = position_bias
    if attention_mask is None:
        # the modules that don't say are those of encoders, to whom no mask means that all is seen
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
        window = (None, None) if sliding_window is None or not causal else (sliding_window - 1, None)
        if cu_seq_lens_q is not None:
            layout = _borders(query, key, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, causal, window)
        else:
            begins = getattr(module, "layer_idx", 0) == 0
            layout = _plain(query, key, bool(causal), window, position_ids, begins, tracing)
    elif attention_mask.dtype is torch.int32:
        pattern = of_carrier(attention_mask)
        if cu_seq_lens_q is not None and pattern is not None and pattern.keys is None and pattern.chunk is None:
            # borders that are given need not be looked for in the positions
            rule = pattern.causal, pattern.window
            layout = _borders(query, key, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, *rule)
        else:
            layout = _carried(query, key, attention_mask, position_ids)
    elif attention_mask.dtype is torch.bool or attention_mask.dtype is torch.uint8:
        layout = _given(query, key, attention_mask, position_ids, tracing)
    elif attention_mask.is_floating_point():
        layout = full(query.shape[2], key.shape[2], False, (None, None), query.shape[0])
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
        numbers = Operands(
            layout, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, None, None, dropout
        )
        remember_call(call, prepare(facts, layout)._replace(operands=numbers))
    return out.transpose(1, 2).contiguous(), found


def _refuse_unknown(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    for name in sorted(UNKNOWN.intersection(kwargs)):
        if kwargs[name] is not None:
            raise AttentionError(
                f"{type(module).__name__} passes {name!r}, which selects or weighs keys in a way that hf_attn_patch "
                'does not know; load this model with attn_implementation="eager"'
            )


def _may_be_collected(module: torch.nn.Module) -> bool:
    """While tracing: whether to look for a collector. Outside the forward that opens one, dynamo cannot look (it breaks
    the graph at each layer); there only hooks can collect, and they break it themselves."""
    return bool(_active_collector.compiling or module._forward_hooks)


def _weights_are_collected() -> bool:
    """Whether transformers' hooks collect attention weights: some families keep ``output_attentions`` to themselves."""
    collected = _active_collector.get()
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


def _plain(
    query: Tensor,
    key: Tensor,
    causal: bool,
    window: tuple[int | None, None],
    ids: Tensor | None,
    begins: bool,
    tracing: bool,
) -> Layout:
    """No mask: causality as the module says; documents where the positions go back.

    ``begins``: this is a model's first layer. Inference tensors don't tell whether they were written to since the last
    forward, so what was remembered with them counts only within one.
    """
    B, Sq, Sk = query.shape[0], query.shape[2], key.shape[2]
    if causal and Sq > 1 and Sq == Sk and _usable(ids, query):
        assert ids is not None
        if tracing:
            pattern = Pattern(B, Sq, Sk, True, window, device=query.device)
            return Layout(DENSE, B, Sq, Sk, mask=pattern.dense(pattern.starts(ids)))
        known = None if begins and ids.is_inference() else _remembered(ids, (B, Sk, window))
        if known is None:
            known = Pattern(B, Sq, Sk, True, window, device=query.device).resolve(ids)
            _remember(ids, (B, Sk, window), known)
        return known
    if Sq <= 1024 and window == (None, None) and not tracing:
        return remembered_full(Sq, Sk, causal, window, B)
    return full(Sq, Sk, causal, window, B)


def _carried(query: Tensor, key: Tensor, carrier: Tensor, ids: Tensor | None) -> Layout:
    """A carrier of ours: its pattern if it still knows it, else its integers."""
    B, Sq, Sk = query.shape[0], query.shape[2], key.shape[2]
    if carrier.dim() != 4 or carrier.shape[-1] != 2 or carrier.shape[2] < Sq:
        raise AttentionError(
            f"an attention mask of dtype int32 and shape {tuple(carrier.shape)} reached a layer. If it is yours, pass "
            "a bool mask (True: may be seen) or a float mask (added to the scores); if the model changes the masks "
            'that it is given, load it with attn_implementation="eager"'
        )
    pattern = None if torch.compiler.is_compiling() else of_carrier(carrier)
    usable = _usable(ids, query)
    if pattern is not None and pattern.q_len == Sq and pattern.kv_len >= Sk:
        layout = pattern.resolve(ids if usable else None)
        if pattern.kv_len == Sk:
            return layout
        mask = layout.dense(query.device)
        return full(Sq, Sk, False, (None, None), B) if mask is None else Layout(DENSE, B, Sq, Sk, mask=mask[..., :Sk])
    mask = dense_from_carrier(carrier, Sq, Sk)
    return Layout(DENSE, B, Sq, Sk, mask=_with_documents(mask, ids, query, key))


def _given(query: Tensor, key: Tensor, mask: Tensor, ids: Tensor | None, tracing: bool) -> Layout:
    """A mask that is the whole truth: the user's bool, or (uint8) ours from inside a compiled graph."""
    B, Sq, Sk = query.shape[0], query.shape[2], key.shape[2]
    if not tracing:
        if (known := _kept(mask, B, Sk) or _remembered(mask, (B, Sq, Sk))) is not None:
            return known
        if (pattern := of_carrier(mask)) is not None and pattern.kv_len == Sk:
            return pattern.resolve(ids if _usable(ids, query) else None)
    if mask.dim() != 4:
        raise AttentionError(
            f"an attention mask of shape {tuple(mask.shape)} reached a layer; [B, 1, Sq, Sk] is wanted"
        )
    given, mask = mask, mask[..., :Sk]
    if mask.dtype is torch.uint8:
        mask = _with_documents(mask.bool(), ids, query, key)
    layout = Layout(DENSE, B, Sq, Sk, mask=mask)
    if not tracing and not given.is_inference():
        _remember(given, (B, Sq, Sk), layout)
    return layout


def _with_documents(mask: Tensor, ids: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    if not _usable(ids, query) or query.shape[2] != key.shape[2]:
        return mask
    assert ids is not None
    starts = Pattern(query.shape[0], query.shape[2], key.shape[2], True, device=query.device).starts(ids)
    assert starts is not None
    document = starts.cumsum(-1)
    return mask & (document[:, None, :, None] == document[:, None, None, :])


def _borders(
    query: Tensor,
    key: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int | Tensor | None,
    max_k: int | Tensor | None,
    causal: bool,
    window: tuple[int | None, int | None],
) -> Layout:
    """Documents by cumulative lengths, which callers give once a forward."""
    B, Sq, Sk = query.shape[0], query.shape[2], key.shape[2]
    if B != 1:
        raise AttentionError(
            f"cu_seq_lens go with one row of packed tokens, not with a batch of {B}; flatten it to [1, B * S]"
        )
    cu_k = cu_q if cu_k is None else cu_k
    key_ = (Sq, Sk, causal, window)
    known = _remembered(cu_q, key_)
    if known is None:
        limits = (Sq if max_q is None else int(max_q), Sk if max_k is None else int(max_k))
        known = packed(1, Sq, Sk, cu_q.to(query.device), cu_k.to(query.device), *limits, bool(causal), window)
        _remember(cu_q, key_, known)
    return known


def _usable(ids: Tensor | None, query: Tensor) -> bool:
    """Positions that can tell documents apart: [B or 1, Sq] integers (some families leak 3-D ones, or none)."""
    return (
        ids is not None
        and ids.dim() == 2
        and ids.shape[1] == query.shape[2] > 1
        and ids.shape[0] in (1, query.shape[0])
    )


def keep_layout(mask: Tensor, layout: Layout) -> None:
    """Let all layers share the ``layout`` of a bool mask [B, 1, 1, Sk], and what it works out."""
    setattr(mask, _KEPT, (_is_recorded(mask), layout))


def _kept(mask: Tensor, B: int, Sk: int) -> Layout | None:
    """What :func:`keep_layout` kept with the mask, unless the mask was written to since."""
    kept: tuple[bool, Layout] | None = getattr(mask, _KEPT, None)
    # a CUDA graph works out everything itself, whatever its inputs will hold when it runs again
    if kept is None or (not kept[0] and _is_recorded(mask)) or not (mask.is_inference() or mask._version == 0):
        return None
    layout = kept[1]
    return layout if (layout.batch, layout.kv_len) == (B, Sk) else None


def _is_recorded(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _remembered(tensor: Tensor, key: Any) -> Layout | None:
    """What :func:`_remember` kept with the tensor, unless it was written to since."""
    if _is_recorded(tensor):
        return None  # a CUDA graph must work out everything from the tensor, whatever it will hold at replay
    kept = getattr(tensor, "_hf_attn_layouts", None)
    if kept is None or (not tensor.is_inference() and kept[0] != tensor._version):
        return None
    found: Layout | None = kept[1].get(key)
    return found


def _remember(tensor: Tensor, key: Any, layout: Layout) -> None:
    version = 0 if tensor.is_inference() else tensor._version
    kept: tuple[int, dict[Any, Layout]] = getattr(tensor, "_hf_attn_layouts", (-1, {}))
    if kept[0] != version:
        kept = (version, {})
        setattr(tensor, "_hf_attn_layouts", kept)  # noqa: B010 - not an attribute that Tensor declares
    kept[1][key] = layout
