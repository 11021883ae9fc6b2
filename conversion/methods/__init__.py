"""Ways to merge KV heads."""

from __future__ import annotations

from hf_attn_patch.moved import names_from

__getattr__ = names_from(
    "hf_attn_patch.conversion.methods.registry",
    ["AUTO", "DEFAULT", "GROUP", "METHODS", "Merge", "Method", "Option", "all_options", "method_named"],
)
