"""What one attention call asks for: the facts that decide who can run it, and the operands that go with them.

From the tensors of a call to its kind (:class:`CallKind`, with lengths, cheap to make), and from the kind to the
request (:class:`AttentionRequest`, without lengths, what backends are asked).
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_attn_patch.compat.torch import deterministic_algorithms

from .devices import device_of, half_of
from .visibility import DENSE, FULL, Sides, Visibility, VisibilityFacts


def query_class(q_len: int) -> int:
    """The class of a number of queries: 1, 16 (2 to 16 of them) or 17 (more)."""
    return 1 if q_len == 1 else (16 if q_len <= 16 else 17)


#: queries of a tree of guesses at most, and how many keys there are for each at least
TREE_QUERIES, TREE_KEYS = 64, 8


class AttentionRequest(NamedTuple):
    """The facts of a call, hashable: two calls with equal requests take the same backend.

    Lengths are classes, not numbers, so that a growing cache does not ask anew at each token: ``q_class`` is that of
    :func:`query_class`; ``work_bits`` is the bit length of B * HQ * Sq * Sk * D.
    """

    device: str
    capability: int  # of a CUDA device, 90 for Hopper; 0 elsewhere
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    q_class: int
    work_bits: int  # -1 where the lengths are not known (torch.compile)
    streams: int  # B * HKV, the K and V to read; -1 where it is not known
    rows: int  # G * Sq, the queries that share a KV head, of 1 to 16 queries and of a tree; else 0
    square: bool  # as many queries as keys, after the cut of the key axis
    visibility: str  # the kind of the visibility: "full", "padded", "packed" or "dense"
    causal: bool
    windowed: bool
    softcap: bool
    sinks: bool
    bias: bool
    bias_grad: bool
    dropout: bool
    grad: bool
    weights: bool
    per_head_mask: bool
    deterministic: bool
    tracing: bool
    tree: bool = False  # 17 to 64 queries over many more keys, with a mask or bias of their own: speculative decoding

    @property
    def group_size(self) -> int:
        """G = HQ // HKV."""
        return self.heads // self.kv_heads

    @property
    def half(self) -> bool:
        """fp16 or bf16."""
        return self.dtype.itemsize == 2

    def describe(self) -> str:
        """One line for error messages."""
        parts = [
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}",
            f"{self.heads} query and {self.kv_heads} KV heads of {self.head_dim}"
            + (f"/{self.value_dim}" if self.value_dim != self.head_dim else ""),
            {1: "1 query", 16: "2 to 16 queries", 17: "17 to 64 queries" if self.tree else "more than 16 queries"}[
                self.q_class
            ],
            {"full": "no padding", "padded": "padded", "packed": "packed documents", "dense": "a dense mask"}[
                self.visibility
            ],
        ]
        parts += [name for name in ("causal", "windowed", "softcap", "sinks", "bias", "dropout") if getattr(self, name)]
        if self.bias_grad:
            parts.append("gradient of the bias")
        elif self.grad:
            parts.append("gradients")
        parts += ["attention weights"] * self.weights + ["deterministic"] * self.deterministic
        parts += ["under torch.compile"] * self.tracing
        return ", ".join(parts)


class Operands(NamedTuple):
    """The numbers and tensors that go with a request.

    ``visibility`` says who may see whom; ``bias`` is float, broadcastable to [B, HQ, Sq, Sk], added to the scaled (and
    capped) scores; ``sinks`` is [HQ].
    """

    visibility: Visibility
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0

    @property
    def layout(self) -> Visibility:
        """The name that ``visibility`` had, for one release."""
        warnings.warn("Operands.layout is now Operands.visibility", DeprecationWarning, stacklevel=2)
        return self.visibility


class CallKind(NamedTuple):
    """The facts of a call, lengths included: hashable, and cheap to make. Calls of one kind run by one plan."""

    q: torch.Size  # [B, HQ, Sq, D]
    k: torch.Size  # [B, HKV, Sk, D]
    v: torch.Size  # [B, HKV, Sk, Dv]
    dtype: torch.dtype
    device: torch.device
    softcap: bool
    sinks: bool
    bias: bool
    bias_grad: bool
    dropout: bool
    grad: bool
    weights: bool
    deterministic: bool
    backend: str | None  # the one to insist on
    seen: VisibilityFacts


class PlainKind(NamedTuple):
    """All that a call is beside its tensors' values, where it has neither mask nor bias: who may see whom follows from
    it, and so do the operands."""

    q: torch.Size
    k: torch.Size
    v: torch.Size
    dtype: torch.dtype
    device: torch.device
    key_dtype: torch.dtype
    value_dtype: torch.dtype
    causal: bool
    window: Sides
    scale: float | None
    softcap: float | None
    sinks: bool
    dropout: float
    grad: bool
    weights: bool
    deterministic: bool
    backend: str | None
    others: tuple[Any, ...]  # what the caller checks of a call beside these

    def with_facts(self, seen: VisibilityFacts) -> CallKind:
        """The kind of the call, with the facts of the visibility that follows from it."""
        softcap, dropout, grad = self.softcap is not None, self.dropout > 0.0, self.grad
        options = (softcap, self.sinks, False, False, dropout, grad, self.weights, self.deterministic, self.backend)
        return CallKind(self.q, self.k, self.v, self.dtype, self.device, *options, seen)


#: a named tuple's own constructor takes twice as long, and every layer makes some
new_tuple = tuple.__new__
is_grad_enabled = torch.is_grad_enabled


def kind_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    weights: bool,
    deterministic: bool | None,
    backend: str | None,
    seen: VisibilityFacts,
) -> CallKind:
    """The kind of a call of :func:`~hf_attn_patch.attn.dispatch.attend`.

    Args:
        backend: the one to insist on, after :func:`~hf_attn_patch.attn.choice.asked_for` was asked.
        seen: the facts of its visibility.
    """
    bias_grad = grad = False
    if is_grad_enabled():
        bias_grad = bias is not None and bias.requires_grad
        grad = bias_grad or q.requires_grad or k.requires_grad or v.requires_grad
        grad = grad or (sinks is not None and sinks.requires_grad)
    facts = (
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        q.device,
        softcap is not None,
        sinks is not None,
        bias is not None,
        bias_grad,
        dropout > 0.0,
        grad,
        weights,
        deterministic or deterministic_algorithms(),
        backend,
        seen,
    )
    return new_tuple(CallKind, facts)


def plain_kind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: Sides,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
    weights: bool,
    deterministic: bool | None,
    backend: str | None,
    others: tuple[Any, ...] = (),
) -> PlainKind:
    """The kind of a call without mask and bias; the arguments are those of :func:`kind_of`."""
    grad = is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    )
    facts = (
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        q.device,
        k.dtype,
        v.dtype,
        causal,
        window,
        scale,
        softcap,
        sinks is not None,
        dropout,
        grad,
        weights,
        deterministic or deterministic_algorithms(),
        backend,
        others,
    )
    return new_tuple(PlainKind, facts)


def request_of(kind: CallKind, *, tracing: bool = False) -> AttentionRequest:
    """What backends are asked for a kind of call. tracing: its lengths are torch.compile's, and may not be known."""
    (B, HQ, Sq, D), (_, HKV, Sk, Dv) = kind.q, kind.v
    seen, device = kind.seen, device_of(kind.device)
    tree = False
    if not (tracing or kind.grad) and 16 < Sq <= TREE_QUERIES:
        tree = TREE_KEYS * Sq <= Sk and (kind.bias or seen.kind == DENSE)
    return AttentionRequest(
        device=device.device,
        capability=device.capability,
        dtype=kind.dtype,
        heads=HQ,
        kv_heads=HKV,
        head_dim=D,
        value_dim=Dv,
        q_class=query_class(Sq),
        work_bits=-1 if tracing else (B * HQ * Sq * Sk * D).bit_length(),
        streams=-1 if tracing else B * HKV,
        rows=0 if tracing or not (tree or Sq <= 16) else HQ // HKV * Sq,
        square=Sq == seen.keys,
        visibility=seen.kind,
        causal=seen.causal,
        windowed=seen.window != (None, None),
        softcap=kind.softcap,
        sinks=kind.sinks,
        bias=kind.bias,
        bias_grad=kind.bias_grad,
        dropout=kind.dropout,
        grad=kind.grad,
        weights=kind.weights,
        per_head_mask=seen.per_head_mask,
        deterministic=kind.deterministic,
        tracing=tracing,
        tree=tree,
    )


def request_for(B: int, HQ: int, HKV: int, Sq: int, Sk: int, D: int, device: str | None = None) -> AttentionRequest:
    """The request of a causal call without padding or gradients, on this machine's first device or on one of a type."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    q, k = torch.Size((B, HQ, Sq, D)), torch.Size((B, HKV, Sk, D))
    seen = VisibilityFacts(FULL, Sq > 1, (None, None), Sk, True, False)
    half = half_of(where) if where.type == "cuda" else torch.float32
    nothing = dict.fromkeys(("softcap", "sinks", "bias", "bias_grad", "dropout", "grad", "weights"), False)
    kind = CallKind(q, k, k, half, where, **nothing, deterministic=False, backend=None, seen=seen)
    return request_of(kind)
