"""Which keys each query row may see, worked out once per forward.

A mask over Sq x Sk is rarely as free as it looks. Causality, sliding windows, chunks, packed documents and padding all
give query row i one *interval* of keys. So a whole pattern is two integers a row, and the kernels want even less:
a causal flag, a window, the first and last valid key of each batch row, or the borders of the packed documents.

:class:`Layout` is the answer in the form that kernels take; ``mask_pattern.py`` says how a model's mask becomes one.

Shapes: B batch, Sq queries, Sk keys. Positions count keys: query row i sits at key position ``i + offset``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import memo

FULL, PADDED, PACKED, DENSE = "full", "padded", "packed", "dense"


@dataclass(eq=False)
class Layout:
    """What one attention call may see, in the form that kernels take.

    ``kind`` says which fields count:

    - ``full``: every key between ``start`` and ``stop``.
    - ``padded``: of batch row b, keys ``first[b] .. first[b] + length[b]`` (int32 [B], counted from ``start``).
    - ``packed``: documents ``cu_q`` and ``cu_k`` (int32 [N + 1], over the flattened B * S tokens); rows that are
      ``padding`` (bool [B, S]) give zeros.
    - ``dense``: ``mask`` (bool, [B or 1, HQ or 1, Sq, stop - start]) is the whole truth.

    In the first three, ``causal`` and ``window`` (left, right; None is unbounded) apply on top, aligned at the lower
    right: the last query of a row or document sits at its last key. ``start`` and ``stop`` cut the key axis (host
    integers), so that static buffers are never read beyond what was written.
    """

    kind: str
    batch: int
    q_len: int
    kv_len: int
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    start: int = 0
    stop: int | None = None
    first: Tensor | None = None
    length: Tensor | None = None
    restrict_queries: bool = False
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    max_q: int = 0
    max_k: int = 0
    padding: Tensor | None = None
    mask: Tensor | None = None
    _borders: list[tuple[int, int, int, int]] | None = field(default=None, repr=False)
    _segments: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    _dead: Tensor | None = field(default=None, repr=False)
    _key_bounds: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    chosen: dict[Any, Any] = field(default_factory=dict, repr=False)  # dispatch's: facts of a call -> who runs it
    block_mask: Any = field(default=None, repr=False)  # flex_attention's form, built on demand
    scores: dict[Any, Any] = field(default_factory=dict, repr=False)  # the form of kernels that add a float mask
    unseen: Any = field(default=None, repr=False)  # dead_keys, in the form of kernels that would meet them
    _any_dead: bool | None = field(default=None, repr=False)

    @property
    def keys(self) -> int:
        """Length of the key axis that is left after ``start`` and ``stop``."""
        return (self.kv_len if self.stop is None else self.stop) - self.start

    @property
    def whole(self) -> bool:
        """Whether ``start`` and ``stop`` leave all keys."""
        return self.start == 0 and (self.stop is None or self.stop == self.kv_len)

    def dense(self, device: torch.device) -> Tensor | None:
        """Bool [B or 1, 1, Sq, keys], True where a query may see a key; None if it may see all. Built once."""
        if self.mask is None and not (self.kind == FULL and not self.causal and self.window == (None, None)):
            with memo.counted():  # calls of one kind share a layout, those that need gradients too
                mask = self._built(device)
            if memo.capturing(device):
                return mask  # of the graph's memory, and not filled before it runs
            self.mask = mask
        if self.mask is not None and self.mask.device != device:
            self.mask = self.mask.to(device)
        return self.mask

    def _built(self, device: torch.device) -> Tensor:
        q = torch.arange(self.q_len, device=device)[:, None]
        k = torch.arange(self.keys, device=device)[None, :]
        if self.kind == PACKED:
            mask = self._dense_packed(device)
        else:
            mask = band(q + (self.keys - self.q_len), k, self.causal, self.window)[None, None]
        if self.kind == PADDED:
            assert self.first is not None and self.length is not None
            first, length = (t.to(device).view(-1, 1, 1, 1) for t in (self.first, self.length))
            mask = mask & (k >= first) & (k < first + length)
        return mask

    def _dense_packed(self, device: torch.device) -> Tensor:
        assert self.cu_q is not None and self.cu_k is not None
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
        mask = (doc_q[..., :, None] == doc_k[..., None, :]) & band(q, k, self.causal, self.window)
        return mask if self.padding is None else mask & ~self.padding.to(device)[:, None, :, None]

    def borders(self) -> list[tuple[int, int, int, int]]:
        """Packed documents as host integers: (first query, last query + 1, first key, last key + 1). Read once."""
        if self._borders is None:
            assert self.cu_q is not None and self.cu_k is not None
            q, k = torch.stack([self.cu_q, self.cu_k.to(self.cu_q.device)]).tolist()
            self._borders = [r for r in zip(q[:-1], q[1:], k[:-1], k[1:], strict=True) if r[1] > r[0]]
        return self._borders

    def segments(self) -> tuple[Tensor, Tensor]:
        """``padded`` for kernels that take only cumulative lengths: int32 (cu_q, cu_k), each [5 * B + 1].

        Every batch row becomes five consecutive segments (queries, keys): the queries before its valid range with no
        keys, the keys before it with no queries, the valid ones, then the same after. Every token is in one segment,
        so nothing is gathered, nothing is left unwritten, and rows without keys come out as zeros.
        """
        if self._segments is None:
            assert self.first is not None and self.length is not None
            if self.restrict_queries:
                q_first, q_length = self.query_range()
            else:
                q_first, q_length = torch.zeros_like(self.first), torch.full_like(self.length, self.q_len)
            zero = torch.zeros_like(self.first)
            q_after, k_after = self.q_len - q_first - q_length, self.keys - self.first - self.length
            q = torch.stack([q_first, zero, q_length, q_after, zero], 1).flatten().cumsum(0, dtype=torch.int32)
            k = torch.stack([zero, self.first, self.length, zero, k_after], 1).flatten().cumsum(0, dtype=torch.int32)
            self._segments = (torch.nn.functional.pad(q, (1, 0)), torch.nn.functional.pad(k, (1, 0)))
        return self._segments

    def key_bounds(self) -> tuple[Tensor, Tensor] | None:
        """(First, last + 1) valid key of each row, int32 [B] each, where they are known (``padded``)."""
        if self._key_bounds is None and self.kind == PADDED:
            assert self.first is not None and self.length is not None
            self._key_bounds = (self.first, self.first + self.length)
        return self._key_bounds

    def query_range(self) -> tuple[Tensor, Tensor]:
        """``padded`` self-attention: (first, length) of the valid queries of each row, int32 [B] each."""
        assert self.first is not None and self.length is not None
        shift = self.keys - self.q_len
        first = (self.first - shift).clamp(0, self.q_len)
        return first, (self.first + self.length - shift).clamp(0, self.q_len) - first

    def valid_queries(self) -> Tensor | None:
        """``padded``: bool [B, Sq] of the queries whose keys are those of a plain causal row; None if all are."""
        if self.kind != PADDED or not self.restrict_queries:
            return None
        first, length = self.query_range()
        i = torch.arange(self.q_len, device=first.device)
        return (i >= first[:, None]) & (i < (first + length)[:, None])

    def dead_keys(self, device: torch.device) -> Tensor | None:
        """Bool [B or 1, HQ or 1, keys]: the keys that no query of a head sees (they may hold anything, NaN included).

        None where all are seen, as in every ``full`` layout: :func:`full` cuts off what no query reaches back to.
        """
        if self._dead is None:
            if self.kind == PADDED:
                assert self.first is not None and self.length is not None
                k = torch.arange(self.keys, device=self.first.device)
                self._dead = (k < self.first[:, None]) | (k >= (self.first + self.length)[:, None])
                if self.window[0] is not None:
                    self._dead = self._dead | (k < self.keys - self.q_len - self.window[0])
                self._dead = self._dead[:, None]
            elif self.kind == PACKED:
                self._dead = self._dead_of_documents(device)
            elif self.kind != FULL and (mask := self.dense(device)) is not None:
                self._dead = ~mask.any(2)
        return self._dead

    def _dead_of_documents(self, device: torch.device) -> Tensor:
        """Bool [B, 1, keys]: padding, keys of no document or of one without queries, or out of its window's reach."""
        assert self.cu_q is not None and self.cu_k is not None
        cu_q, cu_k = self.cu_q.to(device), self.cu_k.to(device)
        tokens = torch.arange(self.batch * self.keys, device=device)
        document = torch.searchsorted(cu_k, tokens, right=True)
        queries = cu_q[document] - cu_q[document - 1]
        dead = queries == 0
        if self.window[0] is not None:
            dead = dead | (tokens < cu_k[document] - queries - self.window[0])
        dead = dead.view(self.batch, 1, self.keys)
        return dead if self.padding is None else dead | self.padding.to(device)[:, None]

    def has_dead_keys(self) -> bool:
        """Whether there are :meth:`dead_keys`. Read back, once."""
        if self._any_dead is None:
            dead = self.dead_keys(torch.device("cpu")) if self.first is None else self.dead_keys(self.first.device)
            self._any_dead = dead is not None and bool(dead.any())
        return self._any_dead


def band(q: Tensor, k: Tensor, causal: bool, window: tuple[int | None, int | None]) -> Tensor:
    """Causality and window between positions q and k (broadcast): bool."""
    left, right = window
    if causal:
        right = 0 if right is None else min(right, 0)
    mask = torch.ones((), dtype=torch.bool, device=q.device).expand(torch.broadcast_shapes(q.shape, k.shape))
    if right is not None:
        mask = k <= q + right
    if left is not None:
        mask = mask & (k >= q - left)
    return mask


def full(q_len: int, kv_len: int, causal: bool, window: tuple[int | None, int | None], batch: int = 1) -> Layout:
    """No padding, no documents: causality and window alone."""
    left, right = window
    start = 0
    if left is not None:
        start = max(0, kv_len - q_len - left)  # keys that no query reaches back to
    if left is not None and left >= kv_len - start - 1:
        left = None
    if right is not None and right >= q_len - 1:  # the first query sits at key kv_len - q_len
        right = None
    return Layout(FULL, batch, q_len, kv_len, causal and q_len > 1, (left, right), start, kv_len)


#: layouts of short calls, found again by every layer; longer ones may keep a dense mask, which must not outlive them
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
    window: tuple[int | None, int | None] = (None, None),
) -> Layout:
    """Documents given by cumulative lengths over the flattened tokens.

    Tokens after the last border become two more segments, queries without keys and keys without queries, so that
    kernels write zeros for them instead of nothing.
    """
    cu_q, cu_k = cu_q.to(torch.int32), cu_k.to(torch.int32)
    cu_q = torch.nn.functional.pad(cu_q, (0, 2), value=batch * q_len)
    cu_k = torch.nn.functional.pad(torch.cat([cu_k, cu_k[-1:]]), (0, 1), value=batch * kv_len)
    return Layout(PACKED, batch, q_len, kv_len, causal, window, cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k)


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
