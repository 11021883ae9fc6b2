"""Exact attention for Hugging Face models, with as few KV heads as you choose.

Importing it registers the implementation ``"hf_attn_patch"`` with transformers; everything else is imported when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import registration as _registration
from . import zoo as _zoo
from .grouping import GroupingError, KVGrouping

if TYPE_CHECKING:
    from .cache import GrowingCache
    from .dispatch import use_backend
    from .explanation import explain
    from .functional import attention, attention_varlen
    from .request import AttentionError
    from .switch import enable, override
    from .unpadding import unpadded

__version__ = "0.1.0"

#: public name -> module that defines it
_LAZY = {
    "AttentionError": "request",
    "GrowingCache": "cache",
    "attention": "functional",
    "attention_varlen": "functional",
    "enable": "switch",
    "explain": "explanation",
    "override": "switch",
    "unpadded": "unpadding",
    "use_backend": "dispatch",
}

__all__ = [
    "AttentionError",
    "GroupingError",
    "GrowingCache",
    "KVGrouping",
    "attention",
    "attention_varlen",
    "enable",
    "enable_flash_attention",
    "explain",
    "override",
    "unpadded",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "enable_flash_attention":  # the same under the name that people look for
        return __getattr__("enable")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_registration.when_imported("transformers.modeling_utils", _registration.register)
_zoo.register()
