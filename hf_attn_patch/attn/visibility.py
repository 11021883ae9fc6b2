"""Which keys each query row may see, worked out once per forward.

A mask over Sq x Sk is rarely as free as it looks. Causality, sliding windows, chunks, packed documents and padding all
give query row i one *interval* of keys. So a whole pattern is two integers a row, and the kernels want even less:
a causal flag, a window, the first and last valid key of each batch row, or the borders of the packed documents.

A :data:`Visibility` is the answer in the form that kernels take, one of four frozen classes; ``mask_pattern.py`` says
how a model's mask becomes one. Frozen, so that what is worked out from one (:meth:`form`) can be kept with it.

Shapes: B batch, Sq queries, Sk keys. Positions count keys: query row i sits at key position ``i + offset``.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from .banded import NO_WINDOW as NO_WINDOW
from .banded import Banded, Sizes, band
from .banded import Sides as Sides
from .banded import VisibilityFacts as VisibilityFacts

FULL, PADDED, PACKED, DENSE = "full", "padded", "packed", "dense"


@dataclass(frozen=True, eq=False)
class Full(Banded):
    """No padding and no documents: every key between ``start`` and ``stop``, but for causality and a window.

    It is nothing but numbers, so calls of one kind may share one.
    """

    kind: ClassVar[str] = FULL
    shared: ClassVar[bool] = True

    def dense(self, device: torch.device) -> Tensor | None:
        """Bool [1, 1, Sq, keys], True where a query may see a key; None if it may see all."""
        return self.form(("dense", device), lambda: self.band(device), device) if self.banded else None

    def dead_keys(self, device: torch.device) -> None:
        """None: all keys are seen, since :func:`full` cuts off what no query reaches back to."""
        return

    @property
    def has_dead_keys(self) -> bool:
        """Never."""
        return False


@dataclass(frozen=True, eq=False, kw_only=True)
class Padded(Banded):
    """Rows with padding: of batch row b, keys ``first[b] .. first[b] + length[b]``, but for causality and a window.

    ``first`` and ``length`` are int32 [B], counted from ``start``. ``restrict_queries``: queries are padding where
    their own keys are.
    """

    kind: ClassVar[str] = PADDED

    first: Tensor
    length: Tensor
    restrict_queries: bool = False

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """(First, last + 1) valid key of each row, int32 [B] each."""
        return self.first, self.form("end", lambda: self.first + self.length, self.first.device)

    def dense(self, device: torch.device) -> Tensor:
        """Bool [B, 1, Sq, keys], True where a query may see a key."""
        return self.form(("dense", device), lambda: self._dense(device), device)

    def _dense(self, device: torch.device) -> Tensor:
        k = torch.arange(self.keys, device=device)
        first, length = (t.to(device).view(-1, 1, 1, 1) for t in (self.first, self.length))
        return self.band(device) & (k >= first) & (k < first + length)

    def dead_keys(self, device: torch.device) -> Tensor:
        """Bool [B, 1, keys]: the keys that no query sees (they may hold anything, NaN included)."""
        return self.form("dead", self._dead, device)

    def _dead(self) -> Tensor:
        k = torch.arange(self.keys, device=self.first.device)
        dead = (k < self.first[:, None]) | (k >= (self.first + self.length)[:, None])
        if self.window[0] is not None:
            dead = dead | (k < self.keys - self.q_len - self.window[0])
        return dead[:, None]

    @functools.cached_property
    def has_dead_keys(self) -> bool:
        """Whether there are :meth:`dead_keys`. Read back, once."""
        return bool(self.dead_keys(self.first.device).any())

    def segments(self) -> tuple[Tensor, Tensor]:
        """For kernels that take only cumulative lengths: int32 (cu_q, cu_k), each [5 * B + 1].

        Every batch row becomes five consecutive segments (queries, keys): the queries before its valid range with no
        keys, the keys before it with no queries, the valid ones, then the same after. Every token is in one segment,
        so nothing is gathered, nothing is left unwritten, and rows without keys come out as zeros.
        """
        return self.form("segments", self._segments, self.first.device)

    def _segments(self) -> tuple[Tensor, Tensor]:
        if self.restrict_queries:
            q_first, q_length = self.query_range()
        else:
            q_first, q_length = torch.zeros_like(self.first), torch.full_like(self.length, self.q_len)
        zero = torch.zeros_like(self.first)
        q_after, k_after = self.q_len - q_first - q_length, self.keys - self.first - self.length
        q = torch.stack([q_first, zero, q_length, q_after, zero], 1).flatten().cumsum(0, dtype=torch.int32)
        k = torch.stack([zero, self.first, self.length, zero, k_after], 1).flatten().cumsum(0, dtype=torch.int32)
        return torch.nn.functional.pad(q, (1, 0)), torch.nn.functional.pad(k, (1, 0))

    def query_range(self) -> tuple[Tensor, Tensor]:
        """Self-attention: (first, length) of the valid queries of each row, int32 [B] each."""
        shift = self.keys - self.q_len
        first = (self.first - shift).clamp(0, self.q_len)
        return first, (self.first + self.length - shift).clamp(0, self.q_len) - first

    def valid_queries(self) -> Tensor | None:
        """Bool [B, Sq] of the queries whose keys are those of a plain causal row; None if all are."""
        if not self.restrict_queries:
            return None
        first, length = self.query_range()
        i = torch.arange(self.q_len, device=first.device)
        return (i >= first[:, None]) & (i < (first + length)[:, None])


@dataclass(frozen=True, eq=False, kw_only=True)
class Packed(Banded):
    """Documents ``cu_q`` and ``cu_k`` (int32 [N + 1], over the flattened B * S tokens).

    The longest has ``max_q`` queries and ``max_k`` keys; causality and a window apply in each. Rows that are
    ``padding`` (bool [B, S]) give zeros.
    """

    kind: ClassVar[str] = PACKED

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    padding: Tensor | None = None

    def dense(self, device: torch.device) -> Tensor:
        """Bool [B, 1, Sq, keys], True where a query may see a key."""
        return self.form(("dense", device), lambda: self._dense(device), device)

    def _dense(self, device: torch.device) -> Tensor:
        tokens = [torch.arange(self.batch * n, device=device) for n in (self.q_len, self.keys)]
        cu_q, cu_k = self.cu_q.to(device), self.cu_k.to(device)
        doc_q, doc_k = (
            torch.searchsorted(cu, t, right=True).view(self.batch, 1, n)
            for cu, t, n in zip((cu_q, cu_k), tokens, (self.q_len, self.keys), strict=True)
        )
        # positions inside the flattened tokens, aligned at the end of each document
        end_q, end_k = cu_q[doc_q], cu_k[doc_k]
        q = (tokens[0].view(self.batch, 1, -1) - end_q)[..., :, None]
        k = (tokens[1].view(self.batch, 1, -1) - end_k)[..., None, :]
        mask = (doc_q[..., :, None] == doc_k[..., None, :]) & band(q, k, self.sides)
        return mask if self.padding is None else mask & ~self.padding.to(device)[:, None, :, None]

    def borders(self) -> list[tuple[int, int, int, int]]:
        """As host integers: (first query, last query + 1, first key, last key + 1). Read once."""
        return self.form("borders", self._borders, self.cu_q.device)

    def _borders(self) -> list[tuple[int, int, int, int]]:
        q, k = torch.stack([self.cu_q, self.cu_k.to(self.cu_q.device)]).tolist()
        return [r for r in zip(q[:-1], q[1:], k[:-1], k[1:], strict=True) if r[1] > r[0]]

    def dead_keys(self, device: torch.device) -> Tensor:
        """Bool [B, 1, keys]: padding, keys of no document or of one without queries, or out of its window's reach."""
        return self.form("dead", lambda: self._dead(device), device)

    def _dead(self, device: torch.device) -> Tensor:
        cu_q, cu_k = self.cu_q.to(device), self.cu_k.to(device)
        tokens = torch.arange(self.batch * self.keys, device=device)
        document = torch.searchsorted(cu_k, tokens, right=True)
        queries = cu_q[document] - cu_q[document - 1]
        dead = queries == 0
        if self.window[0] is not None:
            dead = dead | (tokens < cu_k[document] - queries - self.window[0])
        dead = dead.view(self.batch, 1, self.keys)
        return dead if self.padding is None else dead | self.padding.to(device)[:, None]

    @functools.cached_property
    def has_dead_keys(self) -> bool:
        """Whether there are :meth:`dead_keys`. Read back, once."""
        return bool(self.dead_keys(self.cu_q.device).any())


@dataclass(frozen=True, eq=False)
class Dense(Sizes):
    """A written-out ``mask`` (bool [B or 1, HQ or 1, Sq, Sk]), which is the whole truth."""

    kind: ClassVar[str] = DENSE
    causal: ClassVar[bool] = False
    window: ClassVar[Sides] = NO_WINDOW
    sides: ClassVar[Sides] = NO_WINDOW
    start: ClassVar[int] = 0
    stop: ClassVar[None] = None
    whole: ClassVar[bool] = True

    mask: Tensor

    @property
    def keys(self) -> int:
        """Length of the key axis."""
        return self.kv_len

    def told(self) -> VisibilityFacts:
        """:attr:`facts`, worked out anew."""
        return VisibilityFacts(DENSE, False, NO_WINDOW, self.kv_len, True, self.mask.shape[1] > 1)

    @functools.cached_property
    def facts(self) -> VisibilityFacts:
        """What of it decides who can run a call."""
        return self.told()

    def dense(self, device: torch.device) -> Tensor:
        """``mask`` on a device."""
        if self.mask.device == device:
            return self.mask
        return self.form(("dense", device), lambda: self.mask.to(device), device)

    def dead_keys(self, device: torch.device) -> Tensor:
        """Bool [B or 1, HQ or 1, keys]: the keys that no query of a head sees (they may hold anything)."""
        return self.form(("dead", device), lambda: ~self.dense(device).any(2), device)

    @functools.cached_property
    def has_dead_keys(self) -> bool:
        """Whether there are :meth:`dead_keys`. Read back, once."""
        return bool(self.dead_keys(self.mask.device).any())


#: what one attention call may see
Visibility: TypeAlias = Full | Padded | Packed | Dense


def __getattr__(name: str) -> Any:
    if name != "Layout":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.Layout is now four classes, Full, Padded, Packed and Dense; Visibility is any of them",
        DeprecationWarning,
        stacklevel=2,
    )
    return Visibility


def full(q_len: int, kv_len: int, causal: bool, window: Sides, batch: int = 1) -> Full:
    """No padding, no documents: causality and window alone."""
    left, right = window
    start = 0
    if left is not None:
        start = max(0, kv_len - q_len - left)  # keys that no query reaches back to
    if left is not None and left >= kv_len - start - 1:
        left = None
    if right is not None and right >= q_len - 1:  # the first query sits at key kv_len - q_len
        right = None
    return Full(batch, q_len, kv_len, causal and q_len > 1, (left, right), start, kv_len)


#: those of short calls, found again by every layer; longer ones may keep a dense mask, which must not outlive them
remembered_full = functools.lru_cache(maxsize=64)(full)


def packed(
    batch: int,
    q_len: int,
    kv_len: int,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    window: Sides = NO_WINDOW,
) -> Packed:
    """Documents given by cumulative lengths over the flattened tokens.

    Tokens after the last border become two more segments, queries without keys and keys without queries, so that
    kernels write zeros for them instead of nothing.
    """
    cu_q, cu_k = cu_q.to(torch.int32), cu_k.to(torch.int32)
    cu_q = torch.nn.functional.pad(cu_q, (0, 2), value=batch * q_len)
    cu_k = torch.nn.functional.pad(torch.cat([cu_k, cu_k[-1:]]), (0, 1), value=batch * kv_len)
    return Packed(batch, q_len, kv_len, causal, window, cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k)


def document_starts(position_ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Bool [B, S]: where a new document begins, told from positions that go back.

    Args:
        position_ids: [B, S], integers.
        valid: bool [B, S]; positions of padding are ignored (their values are arbitrary).

    >>> document_starts(torch.tensor([[0, 1, 2, 0, 1, 0]])).int().tolist()
    [[0, 0, 0, 1, 0, 1]]
    """
    batch, length = position_ids.shape
    start = torch.zeros(batch, length, dtype=torch.bool, device=position_ids.device)
    if valid is None:
        start[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
        return start
    index = torch.arange(length, device=position_ids.device)
    last = torch.where(valid, index, -1).cummax(-1).values[:, :-1]  # the last valid token before i
    before = position_ids.gather(1, last.clamp(min=0))
    start[:, 1:] = valid[:, 1:] & (last >= 0) & (position_ids[:, 1:] <= before)
    return start
