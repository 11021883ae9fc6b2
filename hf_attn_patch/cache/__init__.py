"""KV caches that grow in place."""

from __future__ import annotations

from hf_attn_patch.moved import names_from

__getattr__ = names_from(
    "hf_attn_patch.cache.growing_cache",
    ["GrowingCache", "GrowingLayer", "GrowingSlidingWindowLayer", "use_growing_cache"],
)
