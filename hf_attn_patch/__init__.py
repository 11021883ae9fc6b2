"""Exact attention for Hugging Face models, with as few KV heads as you choose.

Importing it registers the implementation ``"hf_attn_patch"`` with transformers; everything else is imported when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import moved as _moved
from .errors import AttentionError, GroupingError, HFAttnError
from .grouping import KVGrouping
from .hf import auto_classes as _zoo
from .hf import registration as _registration

if TYPE_CHECKING:
    from .attn.choice import use_backend
    from .attn.functional import attention, attention_varlen
    from .cache.growing_cache import GrowingCache
    from .enabling import enable, override
    from .explaining.explanation import explain
    from .hf.unpadding import unpadded

__version__ = "0.1.0"

#: public name -> module that defines it
_LAZY = {
    "GrowingCache": "cache.growing_cache",
    "attention": "attn.functional",
    "attention_varlen": "attn.functional",
    "enable": "enabling",
    "explain": "explaining.explanation",
    "override": "enabling",
    "unpadded": "hf.unpadding",
    "use_backend": "attn.choice",
}

__all__ = [
    "AttentionError",
    "GroupingError",
    "GrowingCache",
    "HFAttnError",
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
    if _moved.is_old(f"{__name__}.{name}"):
        globals()[name] = module = _moved.module_of(f"{__name__}.{name}", stacklevel=2)
        return module
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_moved.install()
_registration.when_imported("transformers.modeling_utils", _registration.register)
_zoo.register()
