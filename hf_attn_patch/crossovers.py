"""Where one backend becomes faster than another: the numbers behind the ladder."""

from __future__ import annotations

from dataclasses import dataclass

from .request import AttentionRequest


@dataclass(frozen=True)
class Crossovers:
    """Measured numbers; what is computed does not depend on them.

    Args:
        small_work_bits: bits of B * HQ * Sq * Sk * D up to which the host's time counts more than the device's, so
            that torch's own kernels are quicker than FlashAttention-4 with its Python.
        decode_rows: queries that share a KV head (G * Sq), up to which our decoding kernel is the fastest.
        filling_streams: B * HKV from which FlashAttention-4, which splits no KV head, fills the GPU with few queries.
    """

    small_work_bits: int = 31
    decode_rows: int = 32
    filling_streams: int = 96


#: measured on an H200 (``benchmarks/results``)
SHIPPED = Crossovers()


def crossovers() -> Crossovers:
    """The numbers that count here."""
    return SHIPPED


def is_small(request: AttentionRequest) -> bool:
    """So little work that the host's time counts most (never inside torch.compile, where lengths are not known)."""
    return request.q_class > 16 and 0 <= request.work_bits <= crossovers().small_work_bits


def has_many_rows(request: AttentionRequest) -> bool:
    """A few queries that are too many for our decoding kernel, over enough KV heads for FlashAttention-4."""
    numbers = crossovers()
    return request.rows > numbers.decode_rows and request.streams >= numbers.filling_streams
