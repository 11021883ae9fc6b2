"""The attention function that is registered with transformers under the name ``hf_attn_patch``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional

from hf_attn_patch.attn import memo
from hf_attn_patch.attn.choice import asked_for, asked_in
from hf_attn_patch.attn.dispatch import attend
from hf_attn_patch.attn.plan import plain_calls, remember_plain
from hf_attn_patch.attn.request import PlainKind, plain_kind
from hf_attn_patch.attn.visibility import NO_WINDOW
from hf_attn_patch.compat.batching import layer_writes_pages
from hf_attn_patch.compat.cache_keyword import is_paged
from hf_attn_patch.compat.context_parallel import context_parallel, own_attention
from hf_attn_patch.compat.ground import changed
from hf_attn_patch.compat.later import LaterTensor
from hf_attn_patch.compat.layer_keywords import named_by
from hf_attn_patch.compat.torch import any_autocast, has_forward_hooks, transforms
from hf_attn_patch.compat.transformers import output_collector
from hf_attn_patch.errors import AttentionError

from .call_visibility import Borders, causality, visibility_of
from .context_parallel import Scores, SeenBy, split_forward
from .shared_attention import Asked, over_parts

NAME = "hf_attn_patch"
#: keyword arguments that change which keys are seen or how they are weighed, and that no backend here knows
UNKNOWN = frozenset({"indices", "block_indices", "head_mask", "block_mask", "score_mod", "mask_mod", "alibi", "sinks"})
#: a cache by the names of older transformers; one that arrives here was not taken by the layer
UNTAKEN = frozenset({"past_key_values", "past_key_value", "layer_past"})
#: what is refused wherever it comes from
NEVER = UNKNOWN | UNTAKEN
#: set on modules by :func:`enable` with a backend
BACKEND_ATTRIBUTE = "_hf_attn_backend"
_NOT_PLAIN: PlainKind | None = None
#: what autograd calls the writing of some keys into the memory of all
_WRITTEN = frozenset({"IndexCopyBackward0", "IndexPutBackward0"})
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
    """transformers' attention function, by its names: q [B, HQ, Sq, D], k [B, HKV, Sk, D], v [B, HKV, Sk, Dv].

    Returns:
        out [B, Sq, HQ, Dv], and the weights [B, HQ, Sq, Sk] if ``output_attentions``, else None.

    Raises:
        AttentionError: a request that nothing here can run exactly.
    """
    if kwargs and not (NEVER.isdisjoint(kwargs) and (is_compiling() or not _unheard(type(module), tuple(kwargs)))):
        _refuse_unheard(module, kwargs)
    given = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
    if cache is not None or (kwargs and layer_writes_pages(kwargs)):
        return _paged(module, query, key, value, cache, (scaling, sliding_window, softcap, s_aux), given, kwargs)
    tracing, own = is_compiling(), module.__dict__
    weights = bool(output_attentions) or _weights_are_collected(module, tracing)
    name = own.get(BACKEND_ATTRIBUTE) or (asked_in(module) if own.get("training") and not tracing else None)
    if type(key) is LaterTensor or functional.scaled_dot_product_attention is not own_attention:
        seen_by = attention_mask, position_ids, given, is_causal, sliding_window
        scores, more = (scaling, softcap, s_aux, position_bias), (dropout, weights, deterministic, name)
        by_parts, key, value = _by_parts(module, (query, key, value), seen_by, scores, more, tracing)
        if by_parts is not None:
            return by_parts, None
    kind, causal, window = _NOT_PLAIN, False, NO_WINDOW
    if attention_mask is None:
        causal, window = causality(module, is_causal, sliding_window)
        plain = position_bias is given[0] is None and not tracing and type(query) is Tensor and transforms() is None
        if plain and (position_ids is None or not causal or query.shape[2] == 1) and not any_autocast():
            name = asked_for() if name is None else name  # nothing but numbers: decoding, and such encoders
            kind = plain_kind(
                query, key, value, causal, window, scaling, softcap, s_aux, dropout, weights, deterministic, name
            )
            if (known := plain_calls.get(kind)) is not None:
                (request, _, run), rest = known
                out, found = run(query, key, value, request, rest if s_aux is None else rest._replace(sinks=s_aux))
                return out.transpose(1, 2).contiguous(), found
    query, key, value = _as_taken(module, query, key, value, tracing)
    memo.asks(module, tracing)
    seen, bias = visibility_of(query, key, attention_mask, position_bias, position_ids, given, causal, window, tracing)
    out, found = attend(
        query, key, value, seen, scaling, softcap, s_aux, bias, dropout, weights, deterministic, name, tracing
    )
    if kind is not None:
        remember_plain(kind, seen)
    return out.transpose(1, 2).contiguous(), found


def _by_parts(
    module: torch.nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    seen_by: SeenBy,
    scores: Scores,
    more: tuple[float, bool, bool | None, str | None],
    tracing: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The result [B, Sq, HQ, Dv] where keys lie in parts (on several processes, or in a cache that rows share), else
    None; and the keys and values as they are to be taken then."""
    (query, key, value), (dropout, weights, _, name) = tensors, more
    split = context_parallel()
    if split is not None:
        return split_forward(module, _as_taken(module, *tensors, tracing), seen_by, scores, more, split), key, value
    if type(key) is not LaterTensor:  # somebody else replaced torch's attention
        return None, key, value
    mask, ids, borders, is_causal, sliding_window = seen_by
    others = weights or bool(dropout) or borders[0] is not None
    asked = Asked(name, is_causal, sliding_window, scores, ids, others)
    return over_parts(module, query, key, value, mask, asked)


def _paged(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    options: tuple[float | None, int | None, float | None, Tensor | None],
    borders: Borders,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    from .continuous_batching import paged_forward

    if cache is not None and not is_paged(cache):
        _refuse_cache(module, "cache", cache)
    kwargs |= dict(zip(("scaling", "sliding_window", "softcap", "sinks"), options, strict=True))
    kwargs |= dict(zip(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"), borders, strict=True))
    return paged_forward(module, query, key, value, cache, **kwargs)


def _refuse_cache(module: torch.nn.Module, name: str, cache: Any) -> None:
    raise AttentionError(
        f"{type(module).__name__} handed {name!r} ({type(cache).__name__}) on to the attention function instead of "
        "filling it, so later steps would not see these keys: the layer's forward has to take the cache by the name "
        'that this transformers gives it ("past_key_values" up to 5.23, "cache" from 5.24) and update it; until then '
        "run the model with use_cache=False"
    )


def unknown_way(layer: str, name: str) -> AttentionError:
    """The error for a layer that hands over ``name``."""
    return AttentionError(
        f"{layer} passes {name!r}, which selects or weighs keys in a way that hf_attn_patch does not know; load this "
        'model with attn_implementation="eager"'
    )


def _unheard_of(layer: type, names: tuple[str, ...]) -> tuple[str, ...]:
    """Which of the further keyword arguments a layer of transformers names itself, though nobody here knows them."""
    return tuple(sorted((named_by(layer) - _HEEDED - NEVER).intersection(names)))


def _refuse_unheard(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    given = {name: value for name, value in sorted(kwargs.items()) if value is not None}
    for name in UNTAKEN.intersection(given):
        _refuse_cache(module, name, given[name])
    for name in sorted(UNKNOWN.intersection(given)):
        raise unknown_way(type(module).__name__, name)
    for name in () if is_compiling() else _unheard(type(module), tuple(given)):
        raise changed("transformers", f"what {type(module).__name__} hands to its attention function ({name!r})")


_unheard: Callable[[type, tuple[str, ...]], tuple[str, ...]] = functools.lru_cache(maxsize=1024)(_unheard_of)
_HEEDED = frozenset(inspect.signature(attention_forward).parameters)


def _may_be_collected(module: torch.nn.Module) -> bool:
    """While tracing: whether to look for a collector. Outside the forward that opens one, dynamo cannot look (it breaks
    the graph at each layer); there only hooks can collect, and they break it themselves."""
    return bool(_collector.compiling or has_forward_hooks(module))


def _weights_are_collected(module: torch.nn.Module, tracing: bool) -> bool:
    """Whether transformers' hooks collect attention weights: some families keep ``output_attentions`` to themselves."""
    if not (_may_be_collected(module) if tracing else _collector.get() is not None):
        return False
    collected = _collector.get()
    return bool(collected) and any("attentions" in key for key in collected)


def _apart(states: Tensor) -> Tensor:
    """Keys or values as they are now, where they are a static cache's memory, to which the next step writes: autograd
    refuses what was changed since."""
    return states.clone() if type(states.grad_fn).__name__ in _WRITTEN else states


def _as_taken(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, tracing: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast the dtype that a matmul would take (as eager does); otherwise different dtypes are an error. Keys
    and values that autograd will ask for are no memory that a cache writes to."""
    if key.requires_grad and not tracing:
        key, value = _apart(key), _apart(value)
    if query.dtype == key.dtype == value.dtype and not (
        query.dtype is torch.float32 and (tracing or any_autocast()) and torch.is_autocast_enabled(query.device.type)
    ):
        return query, key, value
    device, tensors = query.device.type, (query, key, value)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (t if t.dtype is torch.float64 else t.to(dtype) for t in tensors)
        return q, k, v
    raise AttentionError(
        f"{type(module).__name__} gives query, key and value as {', '.join(str(t.dtype) for t in tensors)}; "
        "run it under torch.autocast, or load the model in one dtype"
    )
