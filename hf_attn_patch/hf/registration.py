"""Making the name ``hf_attn_patch`` known to transformers without importing it.

``import hf_attn_patch`` must cost nothing (``hf-attn --help`` goes through it). So if transformers is loaded, the
functions are registered at once; if not, an import hook registers them right after transformers' own module has run.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

_waiting: dict[str, Callable[[], None]] = {}


def register() -> None:
    """Register the attention, mask and paged functions under our name, and let continuous batching take it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from hf_attn_patch.compat.batching import MODULE

    from .attention_function import NAME, attention_forward
    from .mask_function import build_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, build_mask)
    AttentionInterface.register(f"paged|{NAME}", attention_forward)
    when_imported(MODULE, _admit)


def _admit() -> None:
    from transformers import AttentionInterface

    from hf_attn_patch.attn.backends import triton_decode
    from hf_attn_patch.compat.batching import admit_to_batching, admit_to_block_tables
    from hf_attn_patch.compat.ground import CompatError
    from hf_attn_patch.compat.transformers import global_functions

    from .attention_function import attention_forward

    def ours(name: str) -> bool:
        function = global_functions(AttentionInterface).get(name)
        return function is not None and inspect.unwrap(function) is attention_forward  # `override` wraps it

    try:
        admit_to_batching(ours)
        admit_to_block_tables(ours, lambda: triton_decode.missing() is None)
    except CompatError as error:  # transformers then refuses our name itself, and this says why
        logging.getLogger("hf_attn_patch").warning("generate_batch does not take hf_attn_patch: %s", error)


def when_imported(module: str, action: Callable[[], None]) -> None:
    """Run ``action`` once ``module`` has been imported: now, if it has."""
    if module in sys.modules:
        action()
        return
    if not _waiting:
        sys.meta_path.insert(0, _Finder())
    _waiting[module] = action


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module that is waited for, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module that is waited for, with our loader around its own."""
        if fullname not in _waiting:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, _waiting.pop(fullname))
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, action: Callable[[], None]) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action()

    def __getattr__(self, name: str) -> object:  # get_source and the like
        return getattr(self.loader, name)
