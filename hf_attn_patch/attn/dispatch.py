"""The ladder: the first backend that can run a request exactly, and why the others can't.

The order is ``ladder.py``'s, by what was measured. The choice for a request is remembered, and calls of one kind find
it by their shapes and options alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_attn_patch.compat.torch import deterministic_algorithms
from hf_attn_patch.errors import AttentionError

from .backends import reference
from .backends.base import RunFunction
from .backends.registry import BACKENDS as BACKENDS
from .backends.registry import backend, when_changed
from .choice import asked_for, changes_between_tasks, traced_for
from .devices import device_of, half_of
from .ladder import order
from .request import AttentionRequest, Operands, query_class
from .visibility import DENSE, FULL, Layout, remembered_full

logger = logging.getLogger("hf_attn_patch")

_chosen: dict[tuple[AttentionRequest, str | None], tuple[str, RunFunction]] = {}
#: while a model is rehearsed (``explaining``): what is told of each call in place of running it
listening: ContextVar[Callable[..., tuple[Tensor, Tensor | None]] | None] = ContextVar("listening", default=None)


def reasons(request: AttentionRequest) -> list[tuple[str, str | None]]:
    """Every backend in the order it is tried, with the reason why it can't run the request (None: it can)."""
    return [(name, backend(name).refuses(request)) for name in order(request)]


def choose(request: AttentionRequest, name: str | None = None) -> tuple[str, RunFunction]:
    """The backend that runs ``request``: ``name`` if given, else the first on the ladder that can.

    Raises:
        AttentionError: the backend asked for by name cannot run the request exactly.
    """
    name = name or (traced_for() if request.tracing else asked_for())
    known = None if request.tracing else _chosen.get((request, name))
    if known is not None:
        return known
    if name is not None:
        module = backend(name)
        if reason := module.refuses(request):
            raise AttentionError(
                f"backend {name!r} cannot run this exactly: {reason} ({request.describe()}); "
                "leave the choice to hf_attn_patch (backend=None) or name another"
            )
        found: tuple[str, RunFunction] = (name, module.run)
    else:
        found = _first(request)
    if not request.tracing:
        _chosen[(request, name)] = found
        if logger.isEnabledFor(logging.INFO):
            passed = "; ".join(f"{n}: {why}" for n, why in reasons(request) if why and name is None)
            logger.info("%s for %s%s", found[0], request.describe(), f" ({passed})" if passed else "")
    return found


def _first(request: AttentionRequest) -> tuple[str, RunFunction]:
    for name in order(request):  # a plain loop: torch.compile traces it
        found = backend(name)
        if found.refuses(request) is None:
            return name, found.run
    raise AttentionError(f"no backend can run this exactly: {request.describe()}")


def forget() -> None:
    """Forget remembered choices (after installing a package, say)."""
    _chosen.clear()
    known_calls.clear()
    remembered_full.cache_clear()


when_changed(forget)


class Known(NamedTuple):
    """What was worked out for a kind of call: the layout, the request, and the function that runs it."""

    layout: Layout
    request: AttentionRequest
    run: RunFunction
    operands: Operands | None = None  # where they are only numbers


#: calls of one kind, found again by the numbers alone: no mask, no padding, nothing that could hold a large tensor
known_calls: dict[Any, Known] = {}
_MOST_KNOWN = 1024  # a growing cache makes a new kind at each token


def remember_call(
    key: Any, facts: tuple[Any, ...], layout: Layout, scale: float | None, softcap: float | None, dropout: float
) -> None:
    """Keep what was worked out for calls of one kind, unless its layout may come to hold a mask of many queries."""
    needs_mask = layout.window != (None, None) or (layout.causal and layout.q_len != layout.keys)
    if layout.kind != FULL or (needs_mask and layout.q_len > 1024):
        return
    if len(known_calls) >= _MOST_KNOWN:
        known_calls.clear()
    operands = Operands(layout, (facts[0][-1] or 1) ** -0.5 if scale is None else scale, softcap, None, None, dropout)
    known_calls[key] = prepare(facts, layout)._replace(operands=operands)


def facts_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    weights: bool = False,
    deterministic: bool = False,
    name: str | None = None,
) -> tuple[Any, ...]:
    """The facts of a call that decide who runs it, but for its layout: hashable, and cheap to make.

    Args:
        name: the backend to insist on, after :func:`asked_for` was asked.
    """
    bias_grad = grad = False
    if torch.is_grad_enabled():
        bias_grad = bias is not None and bias.requires_grad
        grad = bias_grad or q.requires_grad or k.requires_grad or v.requires_grad
        grad = grad or (sinks is not None and sinks.requires_grad)
    return (
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        q.device,
        softcap is None,
        sinks is None,
        bias is None,
        bias_grad,
        dropout > 0.0,
        grad,
        weights,
        deterministic or deterministic_algorithms(),
        name,
    )


def prepare(facts: tuple[Any, ...], layout: Layout) -> Known:
    """Choose the backend for a kind of call (remembered with the layout).

    Raises:
        AttentionError: no backend can run it exactly, or the one asked for by name cannot.
    """
    known: Known | None = layout.chosen.get(facts)
    if known is None:
        q, _, v, dtype, device, *options, name = facts
        request = request_of(q, v, dtype, device, layout, tuple(options), False)
        name, run = choose(request, name)
        shorter = getattr(backend(name), "shorter", None)  # HasShorter: a backend's way for the commonest calls
        run = run if shorter is None else shorter(request, layout) or run
        if _is_empty(q, v, layout):
            run = reference.run
        known = layout.chosen[facts] = Known(layout, request, run)
    return known


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    weights: bool = False,
    deterministic: bool = False,
    name: str | None = None,
    tracing: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run one call on the best backend.

    Args:
        q: [B, HQ, Sq, D]. k: [B, HKV, Sk, D]. v: [B, HKV, Sk, Dv]. One dtype, one device.
        layout: who may see whom. bias: float, broadcastable to [B, HQ, Sq, Sk]. sinks: [HQ].
        scale: defaults to D ** -0.5.
        name: a backend to insist on. tracing: inside torch.compile; asked for if not given.

    Returns:
        out [B, HQ, Sq, Dv], and the weights [B, HQ, Sq, Sk] if asked for.
    """
    if torch.compiler.is_compiling() if tracing is None else tracing:
        if name is None and changes_between_tasks():
            given = {"bias": bias, "dropout": dropout, "weights": weights, "deterministic": deterministic}
            return _untraced(q, k, v, layout=layout, scale=scale, softcap=softcap, sinks=sinks, **given)
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()  # which can be traced
        facts = facts_of(q, k, v, softcap, sinks, bias, dropout, weights, True, name)
        request = request_of(q.shape, v.shape, q.dtype, q.device, layout, (*facts[5:-2], deterministic), True)
        run = choose(request, facts[-1])[1]
        if _is_empty(q.shape, v.shape, layout):
            run = reference.run
    else:
        name = asked_for() if name is None else name
        facts = facts_of(q, k, v, softcap, sinks, bias, dropout, weights, deterministic, name)
        if type(q) is not Tensor and (listener := listening.get()) is not None:
            return listener(q, k, v, layout, facts)
        _, request, run, _ = layout.chosen.get(facts) or prepare(facts, layout)
    operands = Operands(layout, (q.shape[-1] or 1) ** -0.5 if scale is None else scale, softcap, sinks, bias, dropout)
    return run(q, k, v, request, operands)


def _is_empty(q: torch.Size, v: torch.Size, layout: Layout) -> bool:
    """No batch, no queries, no keys or no values: no kernel is made for it, and there is nothing to compute."""
    return 0 in q or 0 in v or layout.keys == 0


@torch.compiler.disable
def _untraced(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return attend(*args, **kwargs, tracing=False)


def request_of(
    q_shape: torch.Size,
    v_shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout,
    options: tuple[bool, ...],
    tracing: bool,
) -> AttentionRequest:
    B, HQ, Sq, D = q_shape
    _, HKV, Sk, Dv = v_shape
    no_softcap, no_sinks, no_bias, bias_grad, dropout, grad, weights, deterministic = options
    mask = layout.mask if layout.kind == DENSE else None
    kind = device_of(device)
    return AttentionRequest(
        device=kind.device,
        capability=kind.capability,
        dtype=dtype,
        heads=HQ,
        kv_heads=HKV,
        head_dim=D,
        value_dim=Dv,
        q_class=query_class(Sq),
        work_bits=-1 if tracing else (B * HQ * Sq * Sk * D).bit_length(),
        streams=-1 if tracing else B * HKV,
        rows=0 if tracing or Sq > 16 else HQ // HKV * Sq,
        square=Sq == layout.keys,
        visibility=layout.kind,
        causal=layout.causal,
        windowed=layout.window != (None, None),
        softcap=not no_softcap,
        sinks=not no_sinks,
        bias=not no_bias,
        bias_grad=bias_grad,
        dropout=dropout,
        grad=grad,
        weights=weights,
        per_head_mask=mask is not None and mask.shape[1] > 1,
        deterministic=deterministic,
        tracing=tracing,
    )


def request_for(B: int, HQ: int, HKV: int, Sq: int, Sk: int, D: int, device: str | None = None) -> AttentionRequest:
    """The request of a causal call without padding or gradients, on this machine's first device or on one of a type."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device == "cuda"
    kind = device_of(torch.device(device))
    return AttentionRequest(
        device=kind.device,
        capability=kind.capability,
        dtype=half_of(torch.device(device)) if cuda else torch.float32,
        heads=HQ,
        kv_heads=HKV,
        head_dim=D,
        value_dim=D,
        q_class=query_class(Sq),
        work_bits=(B * HQ * Sq * Sk * D).bit_length(),
        streams=B * HKV,
        rows=0 if Sq > 16 else HQ // HKV * Sq,
        square=Sq == Sk,
        visibility="full",
        causal=Sq > 1,
        **dict.fromkeys(("windowed", "softcap", "sinks", "bias", "bias_grad", "dropout", "grad", "weights"), False),
        **dict.fromkeys(("per_head_mask", "deterministic", "tracing"), False),
    )
