"""Keys and values in other forms than whole: shared by rows of a batch and kept once, or as codes of 8 bits.

The softmax over all keys of a row is put together from softmaxes over its parts: with the partial results ``o_i`` and
the logs of their denominators ``l_i``, ``out = sum(exp(l_i - l) * o_i)`` where ``l = logsumexp(l_i)``. That is exact,
and lets all rows of a prompt go over its keys together, as one tile of queries (Hydragen, arXiv 2402.05099; the cascade
of FlashInfer, arXiv 2501.01005).

Shapes: B rows of the batch, R rows of a shared part (one a prompt), N rows of the batch to each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .codes import Kind, unpack

#: of codes of keys and of values, fp32 [R or B, HKV, S, 1]
Scales = tuple[Tensor, Tensor]


class Rows:
    """Which row of a shared part each row of a batch begins with.

    Args:
        of: [B] numbers of rows of the part.
        count: R, the rows that the part has.

    >>> rows = Rows([0, 0, 0, 1, 1, 1], 2)
    >>> rows.even, rows.most, rows.select([5, 0]).of
    (True, 3, (1, 0))
    >>> Rows([0, 0, 0, 1], 2).order(torch.device("cpu")).tolist()
    [0, 1, 2, 3, 3, 3]
    """

    def __init__(self, of: Sequence[int], count: int) -> None:
        self.of, self.count = tuple(of), count
        members: list[list[int]] = [[] for _ in range(count)]
        for row, part in enumerate(self.of):
            members[part].append(row)
        self.members = members
        self.most = max(map(len, members))
        #: every row of the part has N rows of the batch, one after the other
        self.even = self.of == tuple(part for part in range(count) for _ in range(self.most))
        self._selected: tuple[tuple[int, ...], Rows] | None = None
        self._sent: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.of)

    def select(self, rows: Sequence[int]) -> Rows:
        """Of other rows of the batch: itself where nothing changes."""
        rows = tuple(rows)
        if self._selected is None or self._selected[0] != rows:
            of = tuple(self.of[row] for row in rows)
            self._selected = (rows, self if of == self.of else Rows(of, self.count))
        return self._selected[1]

    def index(self, device: torch.device) -> Tensor:
        """``of`` as int64 [B]."""
        return self.tensors(device)[0]

    def order(self, device: torch.device) -> Tensor:
        """Int64 [R * N]: the rows of the batch of each row of the part; where there are fewer than N, one again."""
        return self.tensors(device)[1]

    def slot(self, device: torch.device) -> Tensor:
        """Int32 [B]: where each row of the batch is in :meth:`order`."""
        return self.tensors(device)[2]

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """All three on a device, sent once (a recording of a step cannot send anything)."""
        if device not in self._sent:
            slots = [0] * len(self.of)
            order: list[int] = []
            for part, rows in enumerate(self.members):
                for n, row in enumerate(rows):
                    slots[row] = part * self.most + n
                order += rows + [rows[-1] if rows else 0] * (self.most - len(rows))
            with torch.inference_mode(False):  # they are used in and outside of it
                self._sent[device] = (
                    torch.tensor(self.of, dtype=torch.int64, device=device),
                    torch.tensor(order, dtype=torch.int64, device=device),
                    torch.tensor(slots, dtype=torch.int32, device=device),
                )
        return self._sent[device]

    def __deepcopy__(self, memo: Any) -> Rows:
        return self  # never changed

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self.of, self.count)


class SharedPart(NamedTuple):
    """Keys [R, HKV, S, D] and values [R, HKV, S, Dv] that rows of a batch have in common; never written to.

    With ``scales`` they are the bits of codes (``codes.py``).
    """

    keys: Tensor
    values: Tensor
    rows: Rows
    scales: Scales | None = None


def shared_keys(parts: Sequence[SharedPart]) -> int:
    """How many keys of each row are shared."""
    return sum(part.keys.shape[2] for part in parts)


class CodedAs(NamedTuple):
    """What keys and values are that lie as the bits of codes: the kind of the codes, the dtype of the numbers."""

    kind: Kind
    dtype: torch.dtype


class Parted:
    """The keys and values of B rows: shared parts, first to last, and what each row has of its own behind them.

    Args:
        shared: none where nothing is shared.
        keys: [B, HKV, So, D]. values: [B, HKV, So, Dv].
        scales, coded: those of the rows' own keys and values, which then are bits of codes, as all parts' are.
    """

    __slots__ = ("coded", "keys", "scales", "shared", "values")

    def __init__(
        self,
        shared: tuple[SharedPart, ...],
        keys: Tensor,
        values: Tensor,
        scales: Scales | None = None,
        coded: CodedAs | None = None,
    ) -> None:
        self.shared, self.keys, self.values = shared, keys, values
        self.scales, self.coded = scales, coded

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.keys.dtype if self.coded is None else self.coded.dtype

    @property
    def widths(self) -> tuple[int, int]:
        """D and Dv."""
        return self.keys.shape[3], self.values.shape[3]

    @property
    def shared_keys(self) -> int:
        """How many keys of each row are shared."""
        return shared_keys(self.shared)

    def make(self, which: int) -> Tensor:
        """All keys [B, HKV, Sk, D] (``which`` 0) or values (1) of each row, put together, as numbers."""
        own = _pick(self.keys, self.values, self.scales, which)
        pieces = [own]
        for part in reversed(self.shared):
            index = part.rows.index(own[0].device)
            pieces.insert(0, [t.index_select(0, index) for t in _pick(part.keys, part.values, part.scales, which)])
        whole = [torch.cat(tensors, dim=2) if len(tensors) > 1 else tensors[0] for tensors in zip(*pieces, strict=True)]
        if self.coded is None:
            return whole[0]
        return unpack(whole[0], whole[1], self.coded.kind.of(which), self.coded.dtype)


def _pick(keys: Tensor, values: Tensor, scales: Scales | None, which: int) -> list[Tensor]:
    """Keys or values, and their scales if there are any."""
    return [(keys, values)[which], *(() if scales is None else (scales[which],))]


def for_part(q: Tensor, rows: Rows) -> Tensor:
    """Queries [B, HQ, Sq, D] as those of a shared part, [R, HQ, N * Sq, D]: row n's query i is query ``n * Sq + i``.

    A view for rows one after the other, as a model's projection lays queries out ([B, Sq, HQ, D] in memory).
    """
    _, HQ, Sq, D = q.shape
    q = q.transpose(1, 2)
    if not rows.even:
        q = q.index_select(0, rows.order(q.device))
    return q.reshape(rows.count, rows.most * Sq, HQ, D).transpose(1, 2)


def mask_for_part(mask: Tensor, rows: Rows, start: int, length: int) -> Tensor:
    """A mask [B or 1, HQ or 1, Sq, Sk] over a part, ``length`` keys from ``start``: [R, HQ or 1, N * Sq, length]."""
    B, H, Sq, _ = mask.shape
    mask = mask[..., start : start + length]
    if B == Sq == 1:  # one for all queries, and a view of it
        return mask.expand(rows.count, -1, rows.most, -1)
    mask = mask.expand(len(rows), -1, -1, -1).transpose(1, 2)
    if not rows.even:
        mask = mask.index_select(0, rows.order(mask.device))
    return mask.reshape(rows.count, rows.most * Sq, H, length).transpose(1, 2)
