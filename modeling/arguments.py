"""The arguments of GroupedQueryAttention that have two names or two halves."""

from __future__ import annotations

from typing import Any


def either(**names: Any) -> Any:
    """The one that is given of an argument's two names."""
    given = [t for t in names.values() if t is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(names)} are two names for one argument: give one")
    return given[0] if given else None


def half_of(past: Any, cross: bool, layer_idx: int) -> tuple[Any, bool]:
    """(the cache that this attention writes to, whether its keys are there already)."""
    if past is None or not hasattr(past, "cross_attention_cache"):
        if past is not None and cross:
            raise ValueError("cross-attention caches in an EncoderDecoderCache, not in a plain cache")
        return past, False
    if cross:
        return past.cross_attention_cache, bool(past.is_updated.get(layer_idx))
    return past.self_attention_cache, False
