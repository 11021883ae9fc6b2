"""Who may see whom in one layer's call: what the layer is given (a mask, positions, borders of documents) as a
:data:`~hf_attn_patch.attn.visibility.Visibility`.

It is worked out at the first layer and kept with the tensor that it came from, where the next layers find it.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from hf_attn_patch.attn import memo
from hf_attn_patch.attn.visibility import (
    NO_WINDOW,
    Dense,
    Sides,
    Visibility,
    document_starts,
    full,
    packed,
    remembered_full,
)
from hf_attn_patch.errors import AttentionError

from .mask_pattern import Pattern, dense_from_carrier, hand_over, is_carrier, of_carrier

_OPEN = "_hf_attn_open"


#: cumulative lengths of documents, of queries and keys, and the longest of each, as transformers hands them to layers
Borders = tuple[Tensor | None, Tensor | None, int | Tensor | None, int | Tensor | None]


def visibility_of(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    ids: Tensor | None,
    borders: Borders,
    causal: bool,
    window: Sides,
    tracing: bool,
) -> tuple[Visibility, Tensor | None]:
    """Who may see whom in a call, and what is added to its scores (float, [B or 1, HQ or 1, Sq, Sk] or None).

    Args:
        query: [B, HQ, Sq, D]. key: [B, HKV, Sk, D].
        mask: what the layer was given: a carrier (int32), a mask (bool, or uint8: open), scores to add (float) or None.
        bias: scores to add. ids: positions [B or 1, Sq], which tell documents apart where nothing else does.
        causal, window: what counts where there is no mask.

    Raises:
        AttentionError: a mask of another dtype, or of a shape that none has.
    """
    seen: Visibility
    cu_q = borders[0]
    if mask is None:
        if cu_q is not None:
            seen = from_borders(query, key, cu_q, borders, causal, window)
        else:
            seen = from_positions(query, key, causal, window, ids, tracing)
    elif mask.dtype is torch.bool or mask.dtype is torch.uint8:
        seen = from_mask(query, key, mask, ids if cu_q is None else positions_in(cu_q, query, ids), tracing)
    elif mask.dtype is torch.int32:
        pattern = None if cu_q is None else of_carrier(mask)
        if cu_q is not None and pattern is not None and pattern.keys is None and pattern.chunk is None:
            # borders that are given need not be looked for in the positions
            seen = from_borders(query, key, cu_q, borders, pattern.causal, pattern.window)
        else:
            seen = from_carrier(query, key, mask, ids if cu_q is None else positions_in(cu_q, query, ids))
    elif mask.is_floating_point():
        _refuse_longer(mask, key)
        seen = full(query.shape[2], key.shape[2], False, NO_WINDOW, query.shape[0])
        bias = mask if bias is None else bias + mask
    else:
        raise AttentionError(
            f"an attention mask of dtype {mask.dtype} and shape {tuple(mask.shape)}: "
            "pass a bool mask (True: may be seen) or a float mask (added to the scores)"
        )
    if bias is not None and bias.shape[-1] != key.shape[2] and bias.shape[-1] != 1:
        bias = bias[..., : key.shape[2]]
    return seen, bias


def causality(module: torch.nn.Module, is_causal: bool | None, sliding_window: int | None) -> tuple[bool, Sides]:
    """Causality and window of a layer that is given no mask; one that does not say is an encoder's, and sees all."""
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    return causal, (sliding_window - 1, None) if sliding_window is not None and causal else NO_WINDOW


def from_positions(
    query: Tensor,
    key: Tensor,
    causal: bool,
    window: Sides,
    ids: Tensor | None,
    tracing: bool,
) -> Visibility:
    """No mask: causality as the module says; documents where the positions go back."""
    B, Sq, Sk = query.shape[0], query.shape[2], key.shape[2]
    if causal and Sq > 1 and Sq == Sk and _usable(ids, query):
        if tracing:
            pattern = Pattern(B, Sq, Sk, True, window, device=query.device)
            return Dense(B, Sq, Sk, mask=pattern.dense(pattern.starts(ids)))
        known: Visibility | None = memo.recall(ids, ("causal", B, Sk, window))
        if known is None:
            known = Pattern(B, Sq, Sk, True, window, device=query.device).resolve(ids)
            memo.keep(ids, ("causal", B, Sk, window), known)
        return known
    if Sq <= 1024 and window == NO_WINDOW and not tracing:
        return remembered_full(Sq, Sk, causal, window, B)
    return full(Sq, Sk, causal, window, B)


def from_carrier(query: Tensor, key: Tensor, carrier: Tensor, ids: Tensor | None) -> Visibility:
    """A carrier of ours: its pattern if it still knows it, else its integers."""
    B, Sq, Sk = query.shape[0], query.shape[2], key.shape[2]
    if not is_carrier(carrier, Sq, Sk):
        raise AttentionError(
            f"an attention mask of dtype int32 and shape {tuple(carrier.shape)} reached a layer. If it is yours, pass "
            "a bool mask (True: may be seen) or a float mask (added to the scores); if the model changes the masks "
            'that it is given, load it with attn_implementation="eager"'
        )
    if torch.compiler.is_compiling():
        mask = dense_from_carrier(carrier, Sq, Sk)
        return Dense(B, Sq, Sk, mask=_with_documents(mask, ids, query, key))
    positions = (ids,) if _usable(ids, query) else ()
    known: Visibility | None = memo.recall(carrier, (Sq, Sk), *positions)
    if known is not None:
        return known
    pattern = of_carrier(carrier)
    if pattern is not None and pattern.q_len == Sq and pattern.kv_len >= Sk:
        known = pattern.resolve(*positions)
        if pattern.kv_len != Sk:
            dense = known.dense(query.device)
            known = full(Sq, Sk, False, NO_WINDOW, B)
            if dense is not None:
                known = Dense(B, Sq, Sk, mask=dense[..., :Sk])
    else:
        mask = dense_from_carrier(carrier, Sq, Sk)
        known = Dense(B, Sq, Sk, mask=_with_documents(mask, ids, query, key))
    memo.keep(carrier, (Sq, Sk), known, *positions)
    return known


def from_mask(query: Tensor, key: Tensor, mask: Tensor, ids: Tensor | None, tracing: bool) -> Visibility:
    """A written-out mask: the whole truth (the user's bool), or ours that is open (uint8, or a bool that says so): what
    lies in other documents is still to be cut off."""
    (B, _, Sq, _), Sk = query.shape, key.shape[2]
    positions: tuple[Tensor, ...] = ()
    if not tracing:
        known: Visibility | None = memo.recall(mask, (B, Sq, Sk))
        if known is not None:
            return known
        if _usable(ids, query):
            positions = (ids,)
            if (known := memo.recall(mask, (B, Sq, Sk, "positions"), ids)) is not None:
                return known
        if (pattern := of_carrier(mask)) is not None and pattern.kv_len == Sk:
            known = pattern.resolve(*positions)
            memo.keep(mask, (B, Sq, Sk, *("positions" for _ in positions)), known, *positions)
            return known
    if mask.dim() != 4:
        raise AttentionError(
            f"an attention mask of shape {tuple(mask.shape)} reached a layer; [B, 1, Sq, Sk] is wanted"
        )
    _refuse_longer(mask, key)
    given, mask = mask, mask.detach()  # kept with the mask, so none that autograd ties to it
    opened = None if tracing else getattr(given, _OPEN, None)
    if mask.dtype is torch.uint8 or opened is not None:
        mask = _with_documents(mask.bool(), ids, query, key, *opened or ())
        read = positions
    else:
        read = ()
    seen = Dense(B, Sq, Sk, mask=mask)
    if not tracing:
        memo.keep(given, (B, Sq, Sk, *("positions" for _ in read)), seen, *read)
    return seen


def _refuse_longer(mask: Tensor, key: Tensor) -> None:
    """Refuse a mask of more keys than there are: which of them it means nobody says."""
    if mask.shape[-1] > key.shape[2]:
        raise AttentionError(
            f"an attention mask of {mask.shape[-1]} keys reached a layer that has {key.shape[2]}: layers with a window "
            "keep the last ones alone, so give such a model a mask for each kind of layer "
            '({"full_attention": ..., "sliding_attention": ...})'
        )


def leave_open(mask: Tensor, keys: Tensor | None) -> None:
    """Say of a written-out mask [B, 1, Sq, Sk] that documents are still to be cut off in the layers, which know them.

    Args:
        keys: bool [B, Sk], those that are no padding; None if all are.
    """
    setattr(mask, _OPEN, (keys if keys is not None else torch.ones(1, mask.shape[-1], dtype=torch.bool),))


def pass_on(ours: Tensor, made: Tensor) -> None:
    """Let another implementation's mask know what ours for the same call knows: its pattern, or that it is open."""
    hand_over(ours, made)
    if (opened := getattr(ours, _OPEN, None)) is not None:
        setattr(made, _OPEN, opened)


def _with_documents(
    mask: Tensor, ids: Tensor | None, query: Tensor, key: Tensor, valid: Tensor | None = None
) -> Tensor:
    """A mask [B or 1, 1, S, S] without what lies in other documents, which begin where the positions go back.

    Args:
        valid: bool [B or 1, S], the tokens that are no padding; None: those that see themselves or that anyone sees.
    """
    if not _usable(ids, query) or query.shape[2] != key.shape[2]:
        return mask
    B = query.shape[0]
    if valid is None:
        valid = mask[:, 0].diagonal(dim1=-2, dim2=-1) | mask[:, 0].any(-2)
    document = document_starts(ids.to(mask.device).expand(B, -1), valid.to(mask.device).expand(B, -1)).cumsum(-1)
    return mask & (document[:, None, :, None] == document[:, None, None, :])


def from_borders(
    query: Tensor,
    key: Tensor,
    cu_q: Tensor,
    borders: Borders,
    causal: bool,
    window: Sides,
) -> Visibility:
    """Documents by cumulative lengths, which callers give once a forward."""
    B, Sq, Sk = query.shape[0], query.shape[2], key.shape[2]
    if B != 1:
        raise AttentionError(
            f"cu_seq_lens go with one row of packed tokens, not with a batch of {B}; flatten it to [1, B * S]"
        )
    _, cu_k, max_q, max_k = borders
    cu_k = cu_q if cu_k is None else cu_k
    others = [t for t in (cu_k, max_q, max_k) if isinstance(t, Tensor)]
    numbers = [None if isinstance(n, Tensor) else n for n in (max_q, max_k)]
    key_ = ("borders", Sq, Sk, causal, window, *numbers)
    known: Visibility | None = memo.recall(cu_q, key_, *others)
    if known is None:
        limits = (Sq if max_q is None else int(max_q), Sk if max_k is None else int(max_k))
        known = packed(1, Sq, Sk, cu_q.to(query.device), cu_k.to(query.device), *limits, causal, window)
        memo.keep(cu_q, key_, known, *others)
    return known


def positions_in(cu: Tensor, query: Tensor, ids: Tensor | None) -> Tensor | None:
    """Positions [1, S] counted inside each of the documents that ``cu [N + 1]`` gives: what tells them apart where a
    mask says the rest. ``ids`` where they don't apply (several rows, or queries that are not all the keys)."""
    S = query.shape[2]
    if query.shape[0] != 1 or S < 2:
        return ids
    known: Tensor | None = memo.recall(cu, ("positions", S))
    if known is None:
        with memo.counted():
            index = torch.arange(S, device=cu.device)
            known = (index - cu[torch.searchsorted(cu, index, right=True) - 1])[None]
        memo.keep(cu, ("positions", S), known)
    return known


def _usable(ids: Tensor | None, query: Tensor) -> TypeGuard[Tensor]:
    """Positions that can tell documents apart: [B or 1, Sq] integers (some families leak 3-D ones, or none)."""
    return (
        ids is not None
        and ids.dim() == 2
        and ids.shape[1] == query.shape[2] > 1
        and ids.shape[0] in (1, query.shape[0])
    )


def keep_visibility(mask: Tensor, seen: Dense) -> None:
    """Let all layers share what is ``seen`` by a bool mask [B, 1, Sq, Sk] of ours, and what is worked out from it."""
    memo.keep(mask, (seen.batch, seen.q_len, seen.kv_len), seen, made=True)
