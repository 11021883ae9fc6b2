"""Triton's interpreter, so that kernels run without a GPU (float16 and float32; its bfloat16 dots are wrong).

Import before any module that defines a kernel: ``triton.jit`` decides when it decorates.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def remember(kind: Any, key: Callable[..., Any], but: str | None = None) -> None:
    """Instances of equal keys are made once and then copied, but for one attribute that is an argument."""
    make, known = kind.__init__, dict[Any, dict[str, Any]]()

    def made(self: Any, *arguments: Any) -> None:
        found = known.get(of := key(*arguments))
        if found is None:
            make(self, *arguments)
            known[of] = {name: value for name, value in vars(self).items() if name != but}
            return
        vars(self).update(found)
        if but:
            setattr(self, but, arguments[0])

    kind.__init__ = made


def _enable() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        # Triton 3.6 turns its one-element arrays into loop bounds with int(array), which NumPy 2.4 refuses
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched

    # the language is made numpy's at every launch and at every call of a function in a kernel, and is taken back after
    # a launch: a third of the time. Nothing else uses it here, so it stays what it was made once.
    patch_language, done = interpreter._patch_lang, set[bool]()

    def patched_once(function: Any) -> Any:
        by_core = any(value is language.core for value in function.__globals__.values())
        if by_core not in done:
            done.add(by_core)
            patch_language(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patched_once

    # which builds a table of all types to look one up
    look_up, dtypes = interpreter._get_np_dtype, dict[str, Any]()

    def np_dtype(dtype: Any) -> Any:
        found = dtypes.get(str(dtype))
        if found is None:
            found = dtypes[str(dtype)] = look_up(dtype)
        return found

    interpreter._get_np_dtype = np_dtype

    # types are made anew for each number, and each tensor works out what its type says
    remember(language.core.tensor, lambda handle, type: type.name, but="handle")
    remember(language.core.block_type, lambda element_ty, shape: (element_ty.name, *shape))


if DEVICE == "cpu":
    _enable()
