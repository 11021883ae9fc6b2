"""One attention call, from its operands to the backend that its plan names (``plan.py``)."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from hf_attn_patch.compat.torch import transforms

from .backends import reference
from .choice import asked_for, changes_between_tasks
from .distributed_tensors import refuse_distributed
from .plan import choose, is_empty, plan_of, plan_of_operators, plans_of_kinds
from .request import CallKind, Operands, kind_of, new_tuple, request_of
from .visibility import Visibility

#: while a model is rehearsed (``explaining``): what is told of each call in place of running it
listening: ContextVar[Callable[..., tuple[Tensor, Tensor | None]] | None] = ContextVar("listening", default=None)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    weights: bool = False,
    deterministic: bool | None = None,
    name: str | None = None,
    tracing: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run one call on the best backend.

    Args:
        q: [B, HQ, Sq, D]. k: [B, HKV, Sk, D]. v: [B, HKV, Sk, Dv]. One dtype, one device.
        visibility: who may see whom. bias: float, broadcastable to [B, HQ, Sq, Sk]. sinks: [HQ].
        scale: defaults to D ** -0.5.
        name: a backend to insist on. tracing: inside torch.compile; asked for if not given.

    Returns:
        out [B, HQ, Sq, Dv], and the weights [B, HQ, Sq, Sk] if asked for.
    """
    tracing = is_compiling() if tracing is None else tracing
    if tracing:
        if name is None and changes_between_tasks():
            given = {"bias": bias, "dropout": dropout, "weights": weights, "deterministic": deterministic}
            return _untraced(q, k, v, visibility=visibility, scale=scale, softcap=softcap, sinks=sinks, **given)
        kind = _traced_kind(q, k, v, softcap, sinks, bias, dropout, weights, deterministic, visibility)
        request = request_of(kind, tracing=True)
        run = choose(request, name).run
        if is_empty(kind):
            run = reference.run
    else:
        name = asked_for() if name is None else name
        facts = visibility.facts
        kind = kind_of(q, k, v, softcap, sinks, bias, dropout, weights, deterministic, name, facts)
        if type(q) is not Tensor:
            if (listener := listening.get()) is not None:
                return listener(q, k, v, visibility, kind)
            refuse_distributed(q)
        if transforms() is None:
            request, _, run = plans_of_kinds.get(kind) or plan_of(kind, visibility)
        else:
            request, _, run = plan_of_operators(kind)
    scale = (q.shape[-1] or 1) ** -0.5 if scale is None else scale
    operands = visibility, scale, softcap, sinks, bias, dropout
    if tracing:
        return run(q, k, v, request, Operands(*operands))
    return run(q, k, v, request, new_tuple(Operands, operands))


@torch.compiler.disable
def _untraced(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, **options: Any) -> tuple[Tensor, Tensor | None]:
    return attend(q, k, v, visibility, **options, tracing=False)


def _traced_kind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    weights: bool,
    deterministic: bool | None,
    visibility: Visibility,
) -> CallKind:
    """:func:`kind_of`, in what torch.compile can trace."""
    training = torch.is_grad_enabled()
    bias_grad = training and bias is not None and bias.requires_grad
    grad = bias_grad or (training and any(t is not None and t.requires_grad for t in (q, k, v, sinks)))
    return CallKind(
        q=q.shape,
        k=k.shape,
        v=v.shape,
        dtype=q.dtype,
        device=q.device,
        softcap=softcap is not None,
        sinks=sinks is not None,
        bias=bias is not None,
        bias_grad=bias_grad,
        dropout=dropout > 0.0,
        grad=grad,
        weights=weights,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
        backend=None,
        seen=visibility.told(),
    )
