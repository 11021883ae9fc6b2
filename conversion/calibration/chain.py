"""A model's layers one after the other, without what stands around them: what can be recorded as a CUDA graph.

Before its layers a model makes masks and positions, and some of that asks the host. For one length all of it is the
same for every batch, so it is made once; what remains are the layers themselves and the norm after them.

Shapes: B batch, S tokens of a sequence, E model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .refit import Arguments, StopForwardError, layer_inputs, run_layer

#: the largest relative difference from the model itself that rounding explains
TOLERANCE = 2e-2


class Chain:
    """Layers with what they are called with for sequences of one length.

    Args:
        run: sends ids [B, S] through the model's body and gives its last hidden states [B, S, E].
        layers: all of them, in order.
        tail: what stands between the last layer and the body's output.
        arguments: what else each layer is called with.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        layers: Sequence[nn.Module],
        tail: Callable[[Tensor], Tensor],
        arguments: list[Arguments],
    ) -> None:
        self.run, self.layers, self.tail, self.arguments = run, layers, tail, arguments

    @torch.no_grad()
    def first(self, ids: Tensor) -> Tensor:
        """What the first layer reads for ``ids`` [B, S]: [B, S, E]."""
        found: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise StopForwardError

        handle = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with contextlib.suppress(StopForwardError):
                self.run(ids)
        finally:
            handle.remove()
        return found[0]

    def __call__(self, hidden: Tensor) -> Tensor:
        """From what the first layer reads [B, S, E] to the body's output."""
        for layer, given in zip(self.layers, self.arguments, strict=True):
            hidden = run_layer(layer, hidden, given)
        return self.tail(hidden)


@torch.no_grad()
def chain_of(
    run: Callable[[Tensor], Tensor], body: nn.Module, layers: Sequence[nn.Module], ids: Tensor
) -> Chain | None:
    """The chain of a model for sequences as long as those of ``ids`` [B, S]; None where its body does more than that.

    Args:
        body: the module that ``run`` calls.
    """
    try:
        _, arguments, _ = layer_inputs(run, layers, ids[:1])
        truth = run(ids).float()
    except (IndexError, KeyError, TypeError):  # layers that are called in another way, or not all of them
        return None
    plain: Callable[[Tensor], Tensor] = lambda hidden: hidden  # noqa: E731
    norms = [child for child in body.children() if "norm" in type(child).__name__.lower()]
    tails: list[Callable[[Tensor], Tensor]] = [*norms, plain]
    for tail in tails:
        made = Chain(run, layers, tail, arguments)
        found = made(made.first(ids)).float()
        if found.shape == truth.shape and (found - truth).norm() <= TOLERANCE * truth.norm():
            return made
    return None
