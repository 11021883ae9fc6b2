"""From a model's mask to a :data:`Visibility`: nothing is read back before it must be, and then once a forward.

transformers asks for a mask once per pattern and forward, and hands whatever 4-D tensor it gets to every layer. What we
give is a *carrier*: int32 [B, 1, Sq, 2] with each query's first and last + 1 visible key; where there is a 2-D mask,
[B, 1, Sq + R, 3], with the validity of its keys as bits behind them (R rows). That is complete in itself, so a copy to
another device or a compiled graph still knows everything; and some queries' rows of the first form say all about
them, where those of the second form are told by their number. On the way that matters, the carrier tensor also
remembers the :class:`Pattern` it was made from, and with it the choice of kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_attn_patch.attn import memo
from hf_attn_patch.attn.visibility import (
    NO_WINDOW,
    Dense,
    Full,
    Packed,
    Padded,
    Sides,
    Visibility,
    document_starts,
    full,
)
from hf_attn_patch.compat.torch import operators_are_watched

_PATTERN = "pattern"
#: up to so many queries the whole mask is small: kernels take it as it is, and nothing is read back
DECODE_QUERIES = 16


@dataclass(eq=False)
class Pattern:
    """Who may see whom, as far as it is known without reading from the device.

    Args:
        causal, window: as in :class:`Full`, in absolute positions.
        offset: key position of the first query: int, or an integer tensor (static caches).
        chunk: (size, left padding [B]) of chunked attention, or None.
        keys: bool [B, Sk], the valid keys (a 2-D padding mask), or None.
        documents: integers [B, S], equal where tokens share a document (Sq == Sk), or None.
    """

    batch: int
    q_len: int
    kv_len: int
    causal: bool
    window: Sides = NO_WINDOW
    offset: int | Tensor = 0
    kv_offset: int | Tensor = 0
    chunk: tuple[int, Tensor] | None = None
    keys: Tensor | None = None
    documents: Tensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _resolved: dict[bool, Visibility] = field(default_factory=dict, repr=False)  # in inference mode?

    def is_plain(self) -> bool:
        """Nothing but causality aligned at the lower right (or nothing at all): no tensor needs to say so."""
        aligned = not self.causal or (isinstance(self.offset, int) and self.offset + self.q_len == self.kv_len)
        reach = self.kv_len - 1
        open_window = all(side is None or side >= reach for side in self.window)
        return aligned and open_window and self.chunk is None and self.keys is None and self.documents is None

    # -- the description on the device -------------------------------------------------------------------------------

    def bounds(self, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """First and last + 1 key of every query, int64 [B or 1, Sq] each; holes in ``keys`` are not in it.

        Args:
            starts: bool [B, Sq], where documents begin in the queries; defaults to those of ``documents``.
        """
        q = torch.arange(self.q_len, device=self.device)[None] + self.offset
        lo, hi = torch.zeros_like(q), torch.full_like(q, self.kv_len)
        left, right = self.window
        if self.causal:
            right = 0 if right is None else min(right, 0)
        if right is not None:
            hi = torch.minimum(hi, q + right + 1)
        if left is not None:
            lo = torch.maximum(lo, q - left)
        starts = self.starts() if starts is None else starts
        begin = None
        if starts is not None:
            index = torch.arange(self.q_len, device=self.device)
            begin = torch.where(starts, index, -1).cummax(-1).values
        if self.chunk is not None:
            size, padding = self.chunk
            shift = padding.to(self.device)[:, None] - self.kv_offset
            if begin is not None:  # a document counts its chunks from its own first token
                shift = torch.where(begin < 0, shift, begin + self.offset)
            chunk = torch.div(q - shift, size, rounding_mode="floor") * size + shift
            lo, hi = torch.maximum(lo, chunk), torch.minimum(hi, chunk + size)
        if starts is not None and begin is not None:
            lo = torch.maximum(lo, torch.where(begin < 0, 0, begin + self.offset))
            following = torch.where(starts, index, self.q_len)[:, 1:].flip(-1).cummin(-1).values.flip(-1)
            end = torch.nn.functional.pad(following, (0, 1), value=self.q_len)
            hi = torch.minimum(hi, torch.where(end < self.q_len, end + self.offset, self.kv_len))
        if self.keys is not None:
            first, end = self.valid_range()
            lo, hi = torch.maximum(lo, first[:, None]), torch.minimum(hi, end[:, None])
        return lo, torch.maximum(lo, hi)

    def valid_range(self) -> tuple[Tensor, Tensor]:
        """First and last + 1 valid key of each row, int64 [B] each; (0, 0) for a row that has none."""
        assert self.keys is not None
        any_valid = self.keys.any(-1)
        index = self.keys.int()
        first, end = index.argmax(-1), self.kv_len - index.flip(-1).argmax(-1)
        return torch.where(any_valid, first, 0), torch.where(any_valid, end, 0)

    def starts(self, position_ids: Tensor | None = None) -> Tensor | None:
        """Bool [B, Sq], where documents begin inside the queries: as transformers found them, or by positions."""
        if self.documents is not None:
            change = self.documents[:, 1:] != self.documents[:, :-1]
            return torch.nn.functional.pad(change, (1, 0), value=False)
        if position_ids is None:
            return None
        position_ids = position_ids.to(self.device).expand(self.batch, -1)
        valid = None
        if self.keys is not None:
            index = (torch.arange(self.q_len, device=self.device) + self.offset).clamp(max=self.kv_len - 1)
            valid = self.keys[:, index]
        return document_starts(position_ids, valid)

    def dense(self, starts: Tensor | None = None) -> Tensor:
        """Bool [B or 1, 1, Sq, Sk]."""
        lo, hi = self.bounds(starts)
        k = torch.arange(self.kv_len, device=self.device)
        mask = (k >= lo[..., None]) & (k < hi[..., None])
        if self.keys is not None:
            mask = mask & self.keys[:, None, :]
        return mask[:, None]

    def carrier(self) -> Tensor:
        """The tensor that travels through the model in place of a mask."""
        return self._known_to(self._rows(self.keys))

    def _rows(self, keys: Tensor | None) -> Tensor:
        """What a carrier holds of the queries, and as bits of ``keys`` (bool [B, Sk])."""
        with memo.counted():
            rows = torch.stack(self.bounds(), -1).to(torch.int32).expand(self.batch, -1, -1)
            if keys is not None:
                rows = torch.cat([torch.nn.functional.pad(rows, (0, 1)), _pack_bits(keys)], 1)
            return rows[:, None].contiguous()

    def _known_to(self, mask: Tensor) -> Tensor:
        memo.keep(mask, _PATTERN, self, made=True, in_any_mode=True)
        return mask

    def sliceable(self) -> Tensor:
        """A mask of which layers may take some queries: a carrier without bits where the bounds say all, else a bool
        one, [B, 1, Sq, Sk]. Where keys are padding the device is waited for."""
        if self.keys is None:
            return self.carrier()
        if not operators_are_watched():
            first, end = self.valid_range()
            if bool((self.keys.sum(-1) == end - first).all()):
                return self._known_to(self._rows(None))
        return self._known_to(self.dense().expand(self.batch, -1, -1, -1))

    # -- what kernels take -------------------------------------------------------------------------------------------

    def resolve(self, position_ids: Tensor | None = None) -> Visibility:
        """The visibility to run; reads the device at most once, and not at all for a few queries.

        Args:
            position_ids: [B or 1, Sq] integers. Where they go back, a new document begins.
        """
        if position_ids is not None and self.causal and self.documents is None:
            return self._resolve(self.starts(position_ids))
        mode = torch.is_inference_mode_enabled()
        if mode not in self._resolved:
            self._resolved[mode] = self._resolve(self.starts())
        return self._resolved[mode]

    def _resolve(self, starts: Tensor | None) -> Visibility:
        decode = self.q_len <= DECODE_QUERIES and self.device.type != "cpu"
        if decode:
            return self._written_out(starts)
        offset, holes, first, any_document, n_documents, longest = self._read(starts)
        stop = offset + self.q_len
        unaligned = (self.causal or self.window != NO_WINDOW) and stop > self.kv_len
        if holes or unaligned or self.chunk is not None or (any_document and offset > 0):
            return self._written_out(starts if any_document else None)
        causal = self.causal and self.q_len > 1
        if any_document:
            assert starts is not None
            return self._packed(starts, n_documents, longest, causal)
        banded = causal or self.window != NO_WINDOW
        if first is None:
            if not banded:
                return full(self.q_len, self.kv_len, False, NO_WINDOW, self.batch)
            return self._banded(stop, causal)
        low, high, least_end, most_end = first
        if banded:
            if high == 0 and least_end >= stop:
                return self._banded(stop, causal)
            start, end = 0, stop
        else:
            start, end = low, most_end
            if low == high and least_end == most_end:
                return Full(self.batch, self.q_len, self.kv_len, start=start, stop=end)
        begin, finish = self.valid_range()
        finish = finish.clamp(max=end)
        return Padded(
            self.batch,
            self.q_len,
            self.kv_len,
            causal,
            self.window,
            start,
            end,
            first=(begin - start).clamp(min=0).to(torch.int32),
            length=(finish - begin).clamp(min=0).to(torch.int32),
            restrict_queries=banded,
        )

    def _banded(self, stop: int, causal: bool) -> Full:
        """Causality and the window, on the keys before ``stop``."""
        return replace(full(self.q_len, stop, causal, self.window, self.batch), kv_len=self.kv_len)

    def _read(self, starts: Tensor | None) -> tuple[int, bool, tuple[int, int, int, int] | None, bool, int, int]:
        """The one read-back: (offset, holes?, (least first, greatest first, least end, greatest end), documents...)."""
        wanted: list[Tensor] = []
        if isinstance(self.offset, Tensor):
            wanted.append(self.offset.reshape(1))
        if self.keys is not None:
            begin, end = self.valid_range()
            count = self.keys.sum(-1)
            some = count > 0
            wanted += [
                (count != end - begin).any()[None],
                torch.where(some, begin, self.kv_len).min()[None],
                begin.max()[None],
                end.min()[None],
                end.max()[None],
            ]
        if starts is not None:
            index = torch.arange(self.q_len, device=self.device)
            longest = (index - torch.where(starts, index, 0).cummax(-1).values).max() + 1
            wanted += [starts.sum()[None], longest[None]]
        values: list[int] = torch.cat([w.to(torch.int64) for w in wanted]).tolist() if wanted else []
        offset = values.pop(0) if isinstance(self.offset, Tensor) else self.offset
        holes, first = False, None
        if self.keys is not None:
            holes = bool(values[0])
            first = (values[1], values[2], values[3], values[4])
            if values[4] == 0:  # no valid key anywhere
                holes = True
            if first == (0, 0, self.kv_len, self.kv_len):
                first = None
            values = values[5:]
        n_documents, longest_document = (values[0], values[1]) if starts is not None else (0, self.q_len)
        return offset, holes, first, n_documents > 0, n_documents, longest_document

    def _packed(self, starts: Tensor, count: int, longest: int, causal: bool) -> Packed:
        tokens = self.batch * self.q_len
        starts = starts.clone()
        starts[:, 0] = True
        padding = None
        if self.keys is not None:
            padding = ~self.keys[:, : self.q_len]
            starts[:, 1:] |= padding[:, 1:] != padding[:, :-1]
            count += 2 * self.batch  # an upper bound: documents of no tokens follow the last one
        index = torch.arange(tokens, device=self.device)
        borders = torch.where(starts.flatten(), index, tokens).sort().values
        borders = torch.nn.functional.pad(borders, (0, 1), value=tokens)
        cu = borders[: min(count + self.batch, tokens) + 1].to(torch.int32)
        return Packed(
            self.batch,
            self.q_len,
            self.kv_len,
            causal,
            self.window,
            stop=self.q_len,
            cu_q=cu,
            cu_k=cu,
            max_q=longest,
            max_k=longest,
            padding=padding,
        )

    def _written_out(self, starts: Tensor | None) -> Dense:
        return Dense(self.batch, self.q_len, self.kv_len, mask=self.dense(starts))


def of_carrier(carrier: Tensor) -> Pattern | None:
    """The pattern that ``carrier`` was made from, if the tensor still knows it."""
    found: Pattern | None = memo.recall(carrier, _PATTERN, in_any_mode=True)
    return found


def is_carrier(mask: Tensor, q_len: int, kv_len: int) -> bool:
    """Whether an int32 tensor has the shape of a carrier for so many queries, or of some rows of one without bits.

    A layer that cuts its mask to the keys that it has cuts nothing, but where they are two the third of the words with
    bits, which says nothing of them.
    """
    if mask.dim() != 4:
        return False
    rows, width = mask.shape[2:]
    if rows > q_len:
        return width == 3 or width == kv_len == 2
    return rows == q_len and width == 2


def hand_over(carrier: Tensor, mask: Tensor) -> None:
    """Let another tensor know the pattern of ``carrier``, if it has one."""
    if (pattern := of_carrier(carrier)) is not None:
        memo.keep(mask, _PATTERN, pattern, made=True, in_any_mode=True)


def dense_from_carrier(carrier: Tensor, q_len: int, kv_len: int) -> Tensor:
    """Bool [B, 1, Sq, Sk] from the carrier's integers alone."""
    lo, hi = carrier[:, :, :q_len, :1], carrier[:, :, :q_len, 1:2]
    k = torch.arange(kv_len, device=carrier.device)
    mask = (k >= lo) & (k < hi)
    if carrier.shape[2] > q_len:
        words = carrier[:, 0, q_len:].flatten(1)
        bits = (words[:, k // 32] >> (k % 32)) & 1
        mask = mask & bits.bool()[:, None, None, :]
    return mask


def _pack_bits(keys: Tensor) -> Tensor:
    """Bool [B, Sk] as int32 [B, R, 3], bit j % 32 of word j // 32."""
    keys = torch.nn.functional.pad(keys, (0, -keys.shape[-1] % 96)).view(keys.shape[0], -1, 32)
    weights = torch.ones((), dtype=torch.int32, device=keys.device) << torch.arange(
        32, dtype=torch.int32, device=keys.device
    )
    return (keys * weights).sum(-1).to(torch.int32).view(keys.shape[0], -1, 3)
