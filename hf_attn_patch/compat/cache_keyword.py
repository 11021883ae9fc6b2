"""By which keyword a cache travels: ``past_key_values`` in models of transformers 5.17 to 5.23, ``cache`` from 5.24.

Blocks and attentions have one of these or ``layer_past``. Nothing here asks for a version: the name is read off the
function that is called, and a cache that arrives is known by what it is. This file travels inside checkpoints
(``--with-code``), so it stands on torch and transformers alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Cache, __version__

#: what transformers 5.17 to 5.24 call it, the newest first
NAMES = ("cache", "past_key_values", "layer_past")


def keyword_of(function: Callable[..., Any]) -> str:
    """The keyword by which ``function`` (a forward, a mask function, the class of an output) takes a cache.

    Raises:
        TypeError: it has none of :data:`NAMES`.

    >>> keyword_of(lambda hidden_states, layer_past=None: None)
    'layer_past'
    """
    parameters = inspect.signature(function).parameters
    for name in NAMES:
        if name in parameters:
            return name
    raise TypeError(
        f"{function.__module__}.{function.__qualname__} of transformers {__version__} takes a cache under none of the "
        f"names that are known from 5.17 to 5.24 ({', '.join(NAMES)}): it has {', '.join(parameters)}"
    )


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Take the cache out of a forward's keyword arguments, under whatever name it came; None where there is none.

    Raises:
        TypeError: two different caches.

    >>> from transformers import DynamicCache
    >>> kwargs = {"past_key_values": DynamicCache(), "use_cache": True}
    >>> take_cache(kwargs), kwargs
    (DynamicCache(layers=[]), {'use_cache': True})
    """
    found = [name for name, value in kwargs.items() if name in NAMES or isinstance(value, Cache)]
    cache, given = None, ""
    for name in found:
        value = kwargs.pop(name)
        if value is None:
            continue
        if cache is not None and value is not cache:
            raise TypeError(
                f"two different caches were given, as {given} and as {name}: give one (prefix tuning of PEFT 0.21 "
                "gives both where transformers is 5.24 or later, which takes PEFT 0.22)"
            )
        cache, given = value, name
    return cache


def update_cache(module: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What an attention layer attends to: its new keys and values after those in the cache among its ``kwargs``.

    The cache leaves ``kwargs``, which go on to the attention function. Paged caches (continuous batching) are no
    ``Cache``: up to transformers 5.23 the attention function writes to them, so they stay; from 5.24 the layer does,
    and ``kwargs`` carry the rest.

    Args:
        module: the layer, with its ``layer_idx``.
        key: [B, HKV, Sq, D]; ``value`` likewise, with Dv.

    Returns:
        [B, HKV, Sk, D] and [B, HKV, Sk, Dv].

    Raises:
        TypeError: two different caches; a paged one whose places are not among ``kwargs``.
    """
    cache = take_cache(kwargs)
    if cache is None:
        return key, value
    if not is_paged(cache):
        keys, values = cache.update(key, value, module.layer_idx)
        return keys, values
    if kwargs.get("cu_seq_lens_q") is None:
        raise TypeError(
            f"{type(module).__name__} got a paged cache without the places of its tokens, which the blocks of this "
            f"family do not hand on (transformers {__version__}): it does not run under continuous batching"
        )
    from transformers.masking_utils import create_causal_mask

    if keyword_of(create_causal_mask) == "cache":  # then the layers write to paged caches too
        keys, values = cache.update(key, value, module.layer_idx, kwargs=kwargs)
        return keys, values
    kwargs["cache"] = cache
    return key, value


def is_paged(cache: Any) -> bool:
    """Whether it is the paged cache of continuous batching.

    >>> from transformers import DynamicCache
    >>> is_paged(DynamicCache())
    False
    """
    if isinstance(cache, Cache):
        return False
    from transformers.generation.continuous_batching import PagedAttentionCache  # much to import, so only when asked

    return isinstance(cache, PagedAttentionCache)
