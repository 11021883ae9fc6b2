"""What was decided for a kind of call, made once and run in every layer: the one place where decisions are remembered.

Three ways lead to a plan, the shortest first. Where a call is nothing but numbers (decoding, encoders without padding),
its kind gives the plan with its operands. Else its kind, with the facts of its visibility, gives the plan. A kind that
is new (a growing cache makes one at each token) gives a request without lengths, and the plan of that; and only a new
request goes down the ladder (``ladder.py``), to the first backend that can run it exactly.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from torch.jit import is_tracing

from hf_attn_patch.compat.torch import derives_further
from hf_attn_patch.errors import AttentionError

from .backends import reference
from .backends.base import RunFunction
from .backends.registry import backend, when_changed
from .choice import asked_for, traced_for
from .devices import no_bf16
from .ladder import order
from .request import AttentionRequest, CallKind, Operands, PlainKind, request_of
from .visibility import Full, Visibility, remembered_full

logger = logging.getLogger("hf_attn_patch")

_MOST_KINDS = 1024  # a growing cache makes a new kind at each token


class AttentionPlan(NamedTuple):
    """Who runs a kind of call: what it asks for, the backend's name, and its function (or a shorter way of its own).

    It holds no tensor and no visibility, so it may be kept; ``run(q, k, v, request, operands)`` gives (out, weights).
    """

    request: AttentionRequest
    backend: str
    run: RunFunction


class PlainCall(NamedTuple):
    """A plan with its operands, for calls that are nothing but numbers."""

    plan: AttentionPlan
    operands: Operands  # all but the sinks


#: what the ladder says of (request, the backend that is insisted on)
plans_of_requests: dict[tuple[AttentionRequest, str | None], AttentionPlan] = {}
#: the same for kinds of calls, with the backend's shorter way where there is one
plans_of_kinds: dict[CallKind, AttentionPlan] = {}
#: the same for kinds of calls that are nothing but numbers; nothing in it can hold a large tensor
plain_calls: dict[PlainKind, PlainCall] = {}


def forget() -> None:
    """Forget what was decided (after installing a package, say)."""
    for plans in (plans_of_requests, plans_of_kinds, plain_calls):
        plans.clear()
    remembered_full.cache_clear()


when_changed(forget)


def choose(request: AttentionRequest, name: str | None = None) -> AttentionPlan:
    """The plan for ``request``: backend ``name`` if given, else the first on the ladder that can run it.

    Raises:
        AttentionError: the backend asked for by name cannot run the request exactly, or none can.
    """
    name = name or (traced_for() if request.tracing else asked_for())
    known = None if request.tracing else plans_of_requests.get((request, name))
    if known is not None:
        return known
    if name is not None:
        module = backend(name)
        if reason := module.refuses(request):
            raise AttentionError(
                f"backend {name!r} cannot run this exactly: {reason} ({request.describe()}); "
                "leave the choice to hf_attn_patch (backend=None) or name another"
            )
        found = AttentionPlan(request, name, module.run)
    else:
        found = _first(request)
    if not request.tracing:
        plans_of_requests[(request, name)] = found
        if name is None and found.backend == "reference" and (slow := no_bf16(request, request.dtype)):
            logger.warning("attention runs by 'reference', exact and slow: %s", slow)
        if logger.isEnabledFor(logging.INFO):
            passed = "; ".join(f"{n}: {why}" for n, why in reasons(request) if why and name is None)
            logger.info("%s for %s%s", found.backend, request.describe(), f" ({passed})" if passed else "")
    return found


def reasons(request: AttentionRequest) -> list[tuple[str, str | None]]:
    """Every backend in the order it is tried, with the reason why it can't run the request (None: it can)."""
    return [(name, backend(name).refuses(request)) for name in order(request)]


def _first(request: AttentionRequest) -> AttentionPlan:
    for name in order(request):  # a plain loop: torch.compile traces it
        found = backend(name)
        if found.refuses(request) is None:
            return AttentionPlan(request, name, found.run)
    raise AttentionError(f"no backend can run this exactly: {request.describe()}")


def plan_of(kind: CallKind, visibility: Visibility) -> AttentionPlan:
    """The plan for a kind of call, remembered.

    Args:
        kind: ``kind.seen`` are the facts of the ``visibility``.

    Raises:
        AttentionError: as :func:`choose` says.
    """
    known = plans_of_kinds.get(kind)
    if known is None:
        if is_tracing():
            raise AttentionError(
                "torch.jit.trace writes down masks and lengths of one call as if they were those of all: use "
                'torch.export, which takes them as they come, or trace the model with attn_implementation="sdpa"'
            )
        known = choose(request_of(kind), kind.backend)
        shorter = getattr(backend(known.backend), "shorter", None)  # HasShorter
        if is_empty(kind):
            known = known._replace(run=reference.run)
        elif shorter is not None and (run := shorter(known.request, visibility)) is not None:
            known = known._replace(run=run)
        if len(plans_of_kinds) >= _MOST_KINDS:
            plans_of_kinds.clear()
        plans_of_kinds[kind] = known
    return known


def plan_of_operators(kind: CallKind) -> AttentionPlan:
    """The plan under torch.func's transforms, whose wrappers only torch's own operators take, and of whose numbers
    nothing can be read: as in a graph, by the two backends that are made of nothing else.

    Raises:
        AttentionError: as :func:`choose` says.
    """
    request = request_of(kind, tracing=True)
    if kind.backend is not None:
        return choose(request, kind.backend)
    fused = not (is_empty(kind) or derives_further() or backend("torch_sdpa").refuses(request))
    return choose(request, "torch_sdpa" if fused else "reference")


def remember_plain(kind: PlainKind, visibility: Visibility) -> None:
    """Keep the plan of a call that was nothing but numbers, with its operands, unless its visibility may come to hold a
    mask of many queries.

    Args:
        visibility: what follows from the ``kind``.
    """
    if not isinstance(visibility, Full):
        return
    needs_mask = visibility.window != (None, None) or (visibility.causal and visibility.q_len != visibility.keys)
    if needs_mask and visibility.q_len > 1024:
        return
    if len(plain_calls) >= _MOST_KINDS:
        plain_calls.clear()
    plan = plan_of(kind.with_facts(visibility.facts), visibility)
    scale = (kind.q[-1] or 1) ** -0.5 if kind.scale is None else kind.scale
    plain_calls[kind] = PlainCall(plan, Operands(visibility, scale, kind.softcap, None, None, kind.dropout))


def is_empty(kind: CallKind) -> bool:
    """No batch, no queries, no keys or no values: no kernel is made for it, and there is nothing to compute."""
    return 0 in kind.q or 0 in kind.v or kind.seen.keys == 0
