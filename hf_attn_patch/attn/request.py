"""What one attention call asks for: the facts that decide who can run it, and the operands that go with them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, dtype

from hf_attn_patch.errors import AttentionError as AttentionError

from .visibility import Layout


def query_class(q_len: int) -> int:
    """The class of a number of queries: 1, 16 (2 to 16 of them) or 17 (more)."""
    return 1 if q_len == 1 else (16 if q_len <= 16 else 17)


class AttentionRequest(NamedTuple):
    """The facts of a call, hashable: two calls with equal requests take the same backend.

    Lengths are classes, not numbers, so that a growing cache does not ask anew at each token: ``q_class`` is that of
    :func:`query_class`; ``work_bits`` is the bit length of B * HQ * Sq * Sk * D.
    """

    device: str
    capability: int  # of a CUDA device, 90 for Hopper; 0 elsewhere
    dtype: dtype
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    q_class: int
    work_bits: int  # -1 where the lengths are not known (torch.compile)
    streams: int  # B * HKV, the K and V to read; -1 where it is not known
    rows: int  # G * Sq, the queries that share a KV head, of 1 to 16 queries; else 0
    square: bool  # as many queries as keys, after the layout's cut
    visibility: str  # Layout.kind
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
            {1: "1 query", 16: "2 to 16 queries", 17: "more than 16 queries"}[self.q_class],
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

    ``bias`` is float, broadcastable to [B, HQ, Sq, Sk], added to the scaled (and capped) scores; ``sinks`` is [HQ].
    """

    layout: Layout
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
