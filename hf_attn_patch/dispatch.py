"""The ladder: the first backend that can run a request exactly, and why the others can't.

The order is what was measured (see docs and ``benchmarks/``): on Hopper FlashAttention-4, then 3, then cuDNN for
prefill and training, cuDNN for decoding without padding; on Ampere and Ada FlashAttention-2 code; on the CPU torch's
flash kernel. The choice for a request is remembered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .backends import flash2, flash3, flash4, flex, reference, torch_sdpa, torch_varlen, triton_decode
from .layout import DENSE, FULL, Layout, remembered_full
from .request import AttentionError, AttentionRequest, Operands

logger = logging.getLogger("hf_attn_patch")

_MODULES: dict[str, Any] = {
    "flash4": flash4,
    "flash3": flash3,
    "flash2": flash2,
    "triton_decode": triton_decode,
    "torch_sdpa": torch_sdpa,
    "torch_varlen": torch_varlen,
    "flex": flex,
    "reference": reference,
}
BACKENDS = tuple(_MODULES)
Run = Callable[[Tensor, Tensor, Tensor, AttentionRequest, Operands], tuple[Tensor, Tensor | None]]

_chosen: dict[tuple[AttentionRequest, str | None], tuple[str, Run]] = {}
_forced: list[str] = []
_deterministic = torch._C._get_deterministic_algorithms  # without the Python around it
_capabilities: dict[torch.device, int] = {}


def backend(name: str) -> Any:
    """The module of a backend: ``refuses(request)`` and ``run(q, k, v, request, operands)``."""
    if name not in _MODULES:
        raise AttentionError(f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return _MODULES[name]


def order(request: AttentionRequest) -> tuple[str, ...]:
    """All backends, the one that was measured fastest for this kind of request first."""
    if request.device != "cuda":
        return ("torch_sdpa", "reference", "triton_decode", "torch_varlen", "flex", "flash4", "flash3", "flash2")
    if request.q_class < 17 and not request.grad:  # decoding: bytes, not arithmetic
        rest = ("flash3", "torch_sdpa", "flash4", "torch_varlen", "flash2", "flex", "reference")
        return ("triton_decode", *rest)
    if request.visibility == FULL and not request.windowed:
        return ("flash4", "flash3", "torch_sdpa", "flash2", "torch_varlen", "flex", "reference", "triton_decode")
    return ("flash4", "flash3", "flash2", "torch_varlen", "flex", "torch_sdpa", "reference", "triton_decode")


def reasons(request: AttentionRequest) -> list[tuple[str, str | None]]:
    """Every backend in the order it is tried, with the reason why it can't run the request (None: it can)."""
    return [(name, backend(name).refuses(request)) for name in order(request)]


def choose(request: AttentionRequest, name: str | None = None) -> tuple[str, Run]:
    """The backend that runs ``request``: ``name`` if given, else the first on the ladder that can.

    Raises:
        AttentionError: the backend asked for by name cannot run the request exactly.
    """
    name = name or (_forced[-1] if _forced else None)
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
        found = (name, module.run)
    else:
        found = _first(request)
    if not request.tracing:
        _chosen[(request, name)] = found
        if logger.isEnabledFor(logging.INFO):
            passed = "; ".join(f"{n}: {why}" for n, why in reasons(request) if why and name is None)
            logger.info("%s for %s%s", found[0], request.describe(), f" ({passed})" if passed else "")
    return found


def _first(request: AttentionRequest) -> tuple[str, Run]:
    for name in order(request):  # a plain loop: torch.compile traces it
        if _MODULES[name].refuses(request) is None:
            return name, _MODULES[name].run
    raise AttentionError(f"no backend can run this exactly: {request.describe()}")


def forget() -> None:
    """Forget remembered choices (after installing a package, say)."""
    _chosen.clear()
    remembered_full.cache_clear()


def _capability(device: torch.device) -> int:
    known = _capabilities.get(device)
    if known is None:
        major, minor = torch.cuda.get_device_capability(device)
        known = _capabilities[device] = 10 * major + minor
    return known


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Insist on one backend for a block; it raises instead of falling back.

    >>> with use_backend("reference"):
    ...     out = attend(*(torch.ones(1, 2, 3, 8),) * 3, layout=Layout("full", 1, 3, 3))[0]
    """
    backend(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


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
    if tracing is None:
        tracing = torch.compiler.is_compiling()
    grad = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    )
    bias_grad = grad and bias is not None and bias.requires_grad
    deterministic = deterministic or (torch.are_deterministic_algorithms_enabled() if tracing else _deterministic())
    options = (softcap is None, sinks is None, bias is None, bias_grad, dropout > 0.0, grad, weights, deterministic)
    if name is None and _forced:
        name = _forced[-1]
    facts = None if tracing else (q.shape, k.shape, v.shape, q.dtype, q.device, options, name)
    known = None if tracing else layout.chosen.get(facts)
    if known is None:
        request = _request(q, k, v, layout, options, tracing)
        run = choose(request, name)[1]
        if not tracing:
            layout.chosen[facts] = request, run
    else:
        request, run = known
    operands = Operands(layout, q.shape[-1] ** -0.5 if scale is None else scale, softcap, sinks, bias, dropout)
    return run(q, k, v, request, operands)


def _request(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, options: tuple[bool, ...], tracing: bool
) -> AttentionRequest:
    B, HQ, Sq, D = q.shape
    _, HKV, Sk, Dv = v.shape
    no_softcap, no_sinks, no_bias, bias_grad, dropout, grad, weights, deterministic = options
    mask = layout.mask if layout.kind == DENSE else None
    return AttentionRequest(
        device=q.device.type,
        capability=_capability(q.device) if q.device.type == "cuda" else 0,
        dtype=q.dtype,
        heads=HQ,
        kv_heads=HKV,
        head_dim=D,
        value_dim=Dv,
        q_class=1 if Sq == 1 else (16 if Sq <= 16 else 17),
        kv_bits=-1 if tracing else (B * HKV * Sk * D).bit_length(),
        batch_is_one=B == 1,
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
