"""Where each model family keeps its heads: data, and what is read from it."""

from __future__ import annotations

from hf_attn_patch.moved import names_from

__getattr__ = names_from(
    "hf_attn_patch.conversion.families.table",
    [
        "FAMILIES",
        "Family",
        "Norm",
        "Projection",
        "RopeKind",
        "Stack",
        "TEXT_PREFIXES",
        "family_of",
        "register",
        "supported",
    ],
)
