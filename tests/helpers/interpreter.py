"""Triton's interpreter, so that kernels run without a GPU (float16 and float32; its bfloat16 dots are wrong).

Import before any module that defines a kernel: ``triton.jit`` decides when it decorates.
"""

from __future__ import annotations

import os
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _enable() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        # Triton 3.6 turns its one-element arrays into loop bounds with int(array), which NumPy 2.4 refuses
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if DEVICE == "cpu":
    _enable()
