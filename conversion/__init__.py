"""Trained multi-head checkpoints into grouped-query ones.

>>> from hf_attn_patch.conversion import convert, plan  # doctest: +SKIP
>>> convert("my-llama", "my-llama-gqa", kv_heads=8)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_attn_patch.errors import ConversionError

if TYPE_CHECKING:
    from .api import convert, plan
    from .budget import kv_heads_under_budget
    from .loading import from_pretrained
    from .processes import together
    from .reports.evaluation import evaluate
    from .reports.inspection import inspect_source
    from .reports.verification import verify
    from .unpacking import dequantize

# looked up when they are asked for: torch and transformers take seconds to import, and `hf-attn --help` needs neither
_LAZY = {
    "convert": "api",
    "dequantize": "unpacking",
    "evaluate": "reports.evaluation",
    "from_pretrained": "loading",
    "inspect_source": "reports.inspection",
    "kv_heads_under_budget": "budget",
    "plan": "api",
    "together": "processes",
    "verify": "reports.verification",
}

__all__ = [
    "ConversionError",
    "convert",
    "dequantize",
    "evaluate",
    "from_pretrained",
    "inspect_source",
    "kv_heads_under_budget",
    "plan",
    "together",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
