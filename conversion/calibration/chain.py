"""A model's layers one after the other, without what stands around them: what can be recorded as a CUDA graph.

Before its layers a model makes masks and positions, and some of that asks the host. For one length all of it is the
same for every batch, so it is made once; what remains are the layers themselves and the norm after them.

Shapes: B batch, S tokens of a sequence, E model width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .refit import Arguments, first_input, layer_inputs, run_layer

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

    def first(self, ids: Tensor) -> Tensor:
        """What the first layer reads for ``ids`` [B, S]: [B, S, E]."""
        return first_input(self.run, self.layers[0], ids)

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


@contextlib.contextmanager
def norms_in_one(models: Sequence[nn.Module]) -> Iterator[None]:
    """RMS norms that are written as many operators run as one, forward and backward, where it gives the same.

    A norm of transformers is eight kernels on a GPU, and some twelve backward: of a small model's step the larger part.
    """
    changed: list[nn.Module] = []
    known: dict[tuple[type, int, float], bool] = {}
    try:
        for model in models:
            for module in model.modules():
                weight, eps = getattr(module, "weight", None), _epsilon(module)
                if eps is None or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
                    continue
                if "forward" in vars(module):  # someone else's
                    continue
                kind = type(module), len(weight), eps
                one = functools.partial(_rms_norm, module, eps)
                if kind not in known:
                    known[kind] = _same(module, one, weight)
                if known[kind]:
                    module.forward = one
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _epsilon(module: nn.Module) -> float | None:
    """Of a norm, by the names that it has in transformers."""
    found = next((vars(module)[n] for n in ("variance_epsilon", "eps") if n in vars(module)), None)
    return float(found) if isinstance(found, int | float) else None


def _rms_norm(module: Any, eps: float, hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, module.weight.shape, module.weight, eps)


@torch.no_grad()
def _same(module: nn.Module, one: Callable[[Tensor], Tensor], weight: Tensor) -> bool:
    """Whether ``one`` is the module, also where what is to be normalized is as small as its epsilon."""
    draw = torch.Generator(weight.device).manual_seed(0)
    shape = (1, 8, len(weight))
    hidden = torch.randn(shape, device=weight.device, generator=draw, dtype=torch.float32)
    for scale in (3.0, 1e-3):
        given = (scale * hidden).to(weight.dtype)
        try:
            want, got = module(given), one(given)
        except (TypeError, RuntimeError):  # no norm, or one of several inputs
            return False
        if not isinstance(want, Tensor) or want.shape != got.shape or want.dtype != got.dtype:
            return False
        if not (want.float() - got.float()).norm() <= 4 * torch.finfo(want.dtype).eps * want.float().norm():
            return False
    return True
