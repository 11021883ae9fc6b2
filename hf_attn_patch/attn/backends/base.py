"""What a backend is: the contract that ours keep, and that another package's must keep to be registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from hf_attn_patch.attn.request import AttentionRequest, Operands
from hf_attn_patch.attn.visibility import Visibility

#: (q, k, v, request, operands) -> (out, weights or None)
RunFunction = Callable[[Tensor, Tensor, Tensor, AttentionRequest, Operands], tuple[Tensor, Tensor | None]]


@runtime_checkable
class Backend(Protocol):
    """A kernel family: a module, or any object, with these three functions."""

    def missing(self) -> str | None:
        """Why nothing of it can run on this machine, in a few words, or None. Shown by ``hf-attn env``."""
        ...

    def refuses(self, request: AttentionRequest) -> str | None:
        """Why it cannot run this request exactly, in a few words, or None.

        Equal requests get equal answers, so that they can be remembered. When in doubt it refuses.
        """
        ...

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, request: AttentionRequest, operands: Operands
    ) -> tuple[Tensor, Tensor | None]:
        """Run a request that it does not refuse.

        Args:
            q: [B, HQ, Sq, D]. k: [B, HKV, Sk, D]. v: [B, HKV, Sk, Dv]. One dtype, one device, any strides.
            request: what was asked of :meth:`refuses`.
            operands: who may see whom (``visibility``), scale, softcap, sinks [HQ], bias and dropout.

        Returns:
            out [B, HQ, Sq, Dv] in q's dtype, and the weights [B, HQ, Sq, Sk] where ``request.weights``, else None.
            A row that sees nothing is 0.
        """
        ...


@runtime_checkable
class HasShorter(Protocol):
    """A backend that has a shorter way for its commonest calls."""

    def shorter(self, request: AttentionRequest, visibility: Visibility) -> RunFunction | None:
        """What runs calls of this kind in place of ``run``, with the same result; None: there is no shorter way.

        It is remembered for all calls of the kind: of the ``visibility`` it may read what is in its ``facts``.
        """
        ...
