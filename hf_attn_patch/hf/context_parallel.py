"""A layer's call under context parallelism: this process's queries of a text whose keys all processes hold a part of.

Only what is surely causal self-attention over one split text is run. What a layer is given says nothing of the other
processes' parts but for ``position_ids``, so documents are told apart by those of all; whatever else would be needed
(a mask of the whole text, a cache) is refused by name.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from hf_attn_patch.attn import memo
from hf_attn_patch.attn.banded import Sides
from hf_attn_patch.attn.context_parallel import chunks, gathered, in_order, rows_of, whole_keys
from hf_attn_patch.attn.dispatch import attend
from hf_attn_patch.attn.visibility import Visibility, packed
from hf_attn_patch.compat.context_parallel import Split
from hf_attn_patch.errors import AttentionError

from .call_visibility import Borders, causality
from .mask_pattern import Pattern, of_carrier

#: the mask, positions, borders, causality and sliding window that a layer is given
SeenBy = tuple[Tensor | None, Tensor | None, Borders, bool | None, int | None]
#: scale, softcap, sinks and position bias
Scores = tuple[float | None, float | None, Tensor | None, Tensor | None]
#: what the queries of each chunk that this process holds see
Parts = list[Visibility]


def _refuse(module: torch.nn.Module, why: str) -> NoReturn:
    raise AttentionError(f"under context_parallel {type(module).__name__} {why}")


@torch.compiler.disable
def split_forward(
    module: torch.nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    seen_by: SeenBy,
    scores: Scores,
    more: tuple[float, bool, bool | None, str | None],
    split: Split,
) -> Tensor:
    """One layer's call, of all processes together.

    Args:
        tensors: q [B, HQ, n, D], k [B, HKV, n, D], v [B, HKV, n, Dv], this process's part of each.
        seen_by: what the mask function made for this part alone, of which the pattern is heeded, not the numbers;
            positions [B or 1, n], sharded like the tokens; borders of the whole text, on every process; causality and
            the sliding window, which count where there is no mask.
        more: dropout, whether weights are asked for, determinism, and a backend to insist on.

    Returns:
        [B, n, HQ, Dv].

    Raises:
        AttentionError: what cannot be run exactly, with the reason.
    """
    q, k, v = tensors
    mask, ids, borders, is_causal, sliding_window = seen_by
    causal, window = causality(module, is_causal, sliding_window)
    (scale, softcap, sinks, bias), (dropout, weights, deterministic, name) = scores, more
    _check(module, q, k, bias, weights)
    if mask is not None:
        causal, window = _pattern(module, q, mask, split)
    if not causal:
        _refuse(module, "attends in both directions, and whether its tokens are split cannot be told; train it without")
    memo.asks(module)
    spans = chunks(q.shape[2], split)
    parts = _parts(module, q, ids, borders, window, spans, split)
    keys, values = whole_keys(k, v, split)
    out = [
        attend(
            rows,
            keys[:, :, :last],
            values[:, :, :last],
            seen,
            scale,
            softcap,
            sinks,
            None,
            dropout,
            False,
            deterministic,
            name,
            False,
        )[0]
        for rows, (_, last), seen in zip(q.chunk(len(spans), 2), spans, parts, strict=True)
    ]
    return torch.cat(out, 2).transpose(1, 2).contiguous()


def _check(module: torch.nn.Module, q: Tensor, k: Tensor, bias: Tensor | None, weights: bool) -> None:
    if q.shape[2] != k.shape[2]:
        _refuse(module, f"has {q.shape[2]} queries and {k.shape[2]} keys: neither caches nor cross-attention are split")
    if bias is not None:
        _refuse(module, "adds to its scores, and holds what is added for its own part of the keys alone")
    if weights:
        _refuse(module, "is asked for its weights, of which each process has its own rows alone")


def _pattern(module: torch.nn.Module, q: Tensor, mask: Tensor, split: Split) -> tuple[bool, Sides]:
    """Causality and window of the pattern that a mask was made from."""
    pattern = of_carrier(mask)
    if pattern is None or pattern.chunk is not None or pattern.q_len != pattern.kv_len or pattern.q_len != q.shape[2]:
        _refuse(module, "was given a mask of its own part of the text, which does not say what the other parts are")
    if pattern.keys is not None:
        alone = memo.recall(mask, ("split", "padding"))
        if alone is None:
            alone = bool(gathered(pattern.keys.all().to(torch.int32)[None], split).all())
            memo.keep(mask, ("split", "padding"), alone)
        if not alone:
            _refuse(
                module, "was given an attention_mask with padding: pad on the right and leave the mask out, or pack"
            )
    return pattern.causal, pattern.window


def _parts(
    module: torch.nn.Module, q: Tensor, ids: Tensor | None, borders: Borders, window: Sides,
    spans: list[tuple[int, int]], split: Split,
) -> Parts:  # fmt: skip
    """Worked out at the first layer, with one exchange and one read-back, and kept for the others."""
    owner = ids if borders[0] is None else borders[0]
    B, n = q.shape[0], q.shape[2]
    if owner is None or (owner is ids and (ids.dim() != 2 or ids.shape[1] != n or ids.shape[0] not in (1, B))):
        _refuse(module, "is not given position_ids [B, S], by which the documents of the other parts are told apart")
    key = ("split", B, n, window, split)
    known: Parts | None = memo.recall(owner, key)
    if known is None:
        _same_length(module, q, split)
        seen = _by_borders(module, q, borders, window, split) if ids is not owner else _by_positions(
            module, q, ids, window, split
        )  # fmt: skip
        known = [rows_of(seen, first, last) for first, last in spans]
        memo.keep(owner, key, known)
    return known


def _same_length(module: torch.nn.Module, q: Tensor, split: Split) -> None:
    lengths = gathered(torch.tensor([q.shape[2]], device=q.device), split).flatten().tolist()
    if len(set(lengths)) > 1:
        _refuse(module, f"has {lengths} tokens on the processes: pad the text to a multiple of {2 * split.size}")


def _by_borders(module: torch.nn.Module, q: Tensor, borders: Borders, window: Sides, split: Split) -> Visibility:
    S = q.shape[2] * split.size
    cu, cu_k, longest, _ = borders
    assert cu is not None
    if q.shape[0] != 1 or int(cu[-1]) != S or (cu_k is not None and not torch.equal(cu, cu_k)):
        _refuse(
            module, f"was given cu_seq_lens up to {int(cu[-1])}, which are not those of one whole text of {S} tokens"
        )
    most = S if longest is None else int(longest)
    return packed(1, S, S, cu.to(q.device), cu.to(q.device), most, most, True, window)


def _by_positions(module: torch.nn.Module, q: Tensor, ids: Tensor, window: Sides, split: Split) -> Visibility:
    with memo.counted():
        whole = in_order(gathered(ids.to(q.device), split), 1, split)
    broken = (whole[:, 1:] != whole[:, :-1] + 1) & (whole[:, 1:] != 0)
    if bool(broken.any()):
        row, at = broken.nonzero()[0].tolist()
        _refuse(
            module,
            f"has position_ids that go from {int(whole[row, at])} to {int(whole[row, at + 1])} in the whole text; "
            "each document counts from 0, and position_ids are to be among the buffers that context_parallel splits",
        )
    S = whole.shape[1]
    pattern = Pattern(q.shape[0], S, S, True, window, device=q.device)
    return pattern.resolve(whole)
