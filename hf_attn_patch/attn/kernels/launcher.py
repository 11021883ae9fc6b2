"""Starting compiled Triton kernels without Triton's work at every call.

``kernel[grid](...)`` binds, classifies and hashes each argument anew: 20 to 30 microseconds for kernels of sixty
arguments, more than their work takes where the KV is short. Here that happens once for a kind of call; afterwards the
compiled kernel is handed its arguments, pointers as plain integers.

Triton compiles for what it sees in an argument: its type, whether it is 1, whether it is a multiple of 16. So calls
of one kind must agree in all of that: :meth:`Launch.first` keeps compiled kernels by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_attn_patch.compat.triton import CompiledParts, compiled_parts, is_watched

Tensors = Sequence[torch.Tensor | None]
Pointers = Sequence[int | None]

_compiled: dict[Any, _Compiled] = {}


class _Compiled:
    """A compiled kernel, the constants that its arguments end with, and the C function that starts it (or None)."""

    __slots__ = ("call", "constants", "function", "kernel", "metadata", "pdl")

    def __init__(self, kernel: Any, parts: CompiledParts, constants: tuple[Any, ...]) -> None:
        self.kernel, self.constants = kernel, constants
        self.function, self.metadata, self.call, self.pdl = parts


class Launch:
    """One kernel, its grid and all its arguments but the pointers.

    Args:
        kernel: a jitted function; its parameters are pointers, then scalars, then constants.
        grid: programs in x and y.
        scalars: the values of the scalars, in order.
        constants: the compile-time values, by name.
        options: num_warps and the like.
    """

    __slots__ = ("compiled", "constants", "grid", "kernel", "options", "scalars")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        scalars: tuple[float, ...],
        constants: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self.kernel, self.grid, self.scalars = kernel, grid, scalars
        self.constants, self.options = constants, options
        self.compiled: _Compiled | None = None

    def first(self, strides: Sequence[int], tensors: Tensors, pointers: Pointers, stream: int) -> None:
        """Start the kernel for the first time: with what was compiled for its kind of call, else as Triton does.

        Args:
            strides: the scalars that Triton specialises on.
        """
        types = [None if t is None or p is None else (t.dtype, p % 16 == 0) for t, p in zip(tensors, pointers)]  # noqa: B905
        classes = [(s == 1, s % 16 == 0, s < 2**31) for s in strides]
        device = next(t.device for t in tensors if t is not None)
        values = (*self.constants.values(), *self.options.values())
        key = (id(self.kernel), device, tuple(types), tuple(classes), values)
        self.compiled = _compiled.get(key)
        if self.compiled is not None:
            self(stream, tensors, pointers)
            return
        kernel = self.kernel[self.grid](*tensors, *self.scalars, **self.constants, **self.options)
        if (parts := compiled_parts(kernel)) is not None:  # interpreted kernels have none
            constants = tuple(self.constants[n] for n in self.kernel.arg_names if n in self.constants)
            self.compiled = _compiled[key] = _Compiled(kernel, parts, constants)

    def __call__(self, stream: int, tensors: Tensors, pointers: Pointers) -> None:
        """Start the kernel on a raw stream of the current device.

        Args:
            tensors: the pointers' tensors; a compiled kernel is handed the ``pointers`` alone.
        """
        compiled = self.compiled
        if compiled is None:
            self.kernel[self.grid](*tensors, *self.scalars, **self.constants, **self.options)
        elif compiled.call is None or is_watched():
            grid = (*self.grid, 1)
            compiled.kernel[grid](*pointers, *self.scalars, *compiled.constants, stream=stream)
        else:
            x, y = self.grid
            compiled.call(
                x, y, 1, stream, compiled.function, False, compiled.pdl, None, None, compiled.metadata,
                None, None, None, *pointers, *self.scalars, *compiled.constants,
            )  # fmt: skip
