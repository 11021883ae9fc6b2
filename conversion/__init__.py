"""Trained multi-head checkpoints into grouped-query ones.

>>> from hf_attn_patch.conversion import convert, plan  # doctest: +SKIP
>>> convert("my-llama", "my-llama-gqa", kv_heads=8)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import ConversionError

if TYPE_CHECKING:
    from .api import convert, plan

# looked up when they are asked for: torch and transformers take seconds to import, and `hf-attn --help` needs neither
_LAZY = {"convert": "api", "plan": "api"}

__all__ = ["ConversionError", "convert", "plan"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
