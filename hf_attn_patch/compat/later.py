"""A tensor that is put together only when something looks at it.

It has a shape, a dtype and a device from the start, and it knows its *form*: what it would be made of. Code of ours
takes the form and never makes it; all other code sees an ordinary tensor, made at the first operation on it and kept.

It stands on how torch lets tensors be extended: ``_make_wrapper_subclass``, ``__torch_dispatch__`` (torch 2.11 to
2.13).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Form(Protocol):
    """What a :class:`LaterTensor` is made of."""

    def make(self, which: int) -> Tensor:
        """The tensor itself; ``which`` of those that share the form."""


class LaterTensor(Tensor):
    """A tensor of ``shape`` that ``form.make(which)`` gives when it is looked at.

    >>> class Ones:
    ...     def make(self, which):
    ...         return torch.ones(2, 3) * which
    >>> later = LaterTensor(Ones(), 5, (2, 3), torch.float32, torch.device("cpu"))
    >>> later.shape, (later + 1).tolist()
    (torch.Size([2, 3]), [[6.0, 6.0, 6.0], [6.0, 6.0, 6.0]])
    """

    form: Any
    which: int
    _made: Tensor | None

    @staticmethod
    def __new__(
        cls, form: Form, which: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> LaterTensor:
        made: LaterTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        made.form, made.which, made._made = form, which, None
        return made

    def whole(self) -> Tensor:
        """The ordinary tensor."""
        if self._made is None:
            self._made = self.form.make(self.which)
        return self._made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LaterTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def whole(value: Any) -> Any:
    """The ordinary tensor of a :class:`LaterTensor`; anything else is what it was."""
    return value.whole() if isinstance(value, LaterTensor) else value
