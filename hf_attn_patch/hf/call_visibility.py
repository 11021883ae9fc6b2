"""Who may see whom in one layer's call: what the layer is given (a mask, positions, borders of documents) as a Layout.

It is worked out at the first layer and kept with the tensor that it came from, where the next layers find it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.attn.visibility import DENSE, Layout, document_starts, full, packed, remembered_full
from hf_attn_patch.errors import AttentionError

from .mask_pattern import Pattern, dense_from_carrier, hand_over, of_carrier

_KEPT = "_hf_attn_layout"
_OPEN = "_hf_attn_open"


def from_positions(
    query: Tensor,
    key: Tensor,
    causal: bool,
    window: tuple[int | None, None],
    ids: Tensor | None,
    begins: bool,
    tracing: bool,
) -> Layout:
    """No mask: causality as the module says; documents where the positions go back.

    ``begins``: this is a model's first layer. Inference tensors don't tell whether they were written to since the last
    forward, so what was remembered with them counts only within one.
    """
    B, Sq, Sk = query.shape[0], query.shape[2], key.shape[2]
    if causal and Sq > 1 and Sq == Sk and _usable(ids, query):
        assert ids is not None
        if tracing:
            pattern = Pattern(B, Sq, Sk, True, window, device=query.device)
            return Layout(DENSE, B, Sq, Sk, mask=pattern.dense(pattern.starts(ids)))
        known = None if begins and ids.is_inference() else _remembered(ids, (B, Sk, window))
        if known is None:
            known = Pattern(B, Sq, Sk, True, window, device=query.device).resolve(ids)
            _remember(ids, (B, Sk, window), known)
        return known
    if Sq <= 1024 and window == (None, None) and not tracing:
        return remembered_full(Sq, Sk, causal, window, B)
    return full(Sq, Sk, causal, window, B)


def from_carrier(query: Tensor, key: Tensor, carrier: Tensor, ids: Tensor | None) -> Layout:
    """A carrier of ours: its pattern if it still knows it, else its integers."""
    B, Sq, Sk = query.shape[0], query.shape[2], key.shape[2]
    if carrier.dim() != 4 or carrier.shape[-1] != 2 or carrier.shape[2] < Sq:
        raise AttentionError(
            f"an attention mask of dtype int32 and shape {tuple(carrier.shape)} reached a layer. If it is yours, pass "
            "a bool mask (True: may be seen) or a float mask (added to the scores); if the model changes the masks "
            'that it is given, load it with attn_implementation="eager"'
        )
    pattern = None if torch.compiler.is_compiling() else of_carrier(carrier)
    usable = _usable(ids, query)
    if pattern is not None and pattern.q_len == Sq and pattern.kv_len >= Sk:
        layout = pattern.resolve(ids if usable else None)
        if pattern.kv_len == Sk:
            return layout
        mask = layout.dense(query.device)
        return full(Sq, Sk, False, (None, None), B) if mask is None else Layout(DENSE, B, Sq, Sk, mask=mask[..., :Sk])
    mask = dense_from_carrier(carrier, Sq, Sk)
    return Layout(DENSE, B, Sq, Sk, mask=_with_documents(mask, ids, query, key))


def from_mask(query: Tensor, key: Tensor, mask: Tensor, ids: Tensor | None, tracing: bool) -> Layout:
    """A written-out mask: the whole truth (the user's bool), or ours that is open (uint8, or a bool that says so): what
    lies in other documents is still to be cut off."""
    B, Sq, Sk = query.shape[0], query.shape[2], key.shape[2]
    if not tracing:
        if (known := _kept(mask, B, Sk) or _remembered(mask, (B, Sq, Sk))) is not None:
            return known
        if (pattern := of_carrier(mask)) is not None and pattern.kv_len == Sk:
            return pattern.resolve(ids if _usable(ids, query) else None)
    if mask.dim() != 4:
        raise AttentionError(
            f"an attention mask of shape {tuple(mask.shape)} reached a layer; [B, 1, Sq, Sk] is wanted"
        )
    given, mask = mask, mask[..., :Sk]
    opened = None if tracing else getattr(given, _OPEN, None)
    if mask.dtype is torch.uint8 or opened is not None:
        mask = _with_documents(mask.bool(), ids, query, key, *opened or ())
    layout = Layout(DENSE, B, Sq, Sk, mask=mask)
    if not tracing and not given.is_inference():
        _remember(given, (B, Sq, Sk), layout)
    return layout


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
    assert ids is not None
    B = query.shape[0]
    if valid is None:
        valid = mask[:, 0].diagonal(dim1=-2, dim2=-1) | mask[:, 0].any(-2)
    document = document_starts(ids.to(mask.device).expand(B, -1), valid.to(mask.device).expand(B, -1)).cumsum(-1)
    return mask & (document[:, None, :, None] == document[:, None, None, :])


def from_borders(
    query: Tensor,
    key: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int | Tensor | None,
    max_k: int | Tensor | None,
    causal: bool,
    window: tuple[int | None, int | None],
) -> Layout:
    """Documents by cumulative lengths, which callers give once a forward."""
    B, Sq, Sk = query.shape[0], query.shape[2], key.shape[2]
    if B != 1:
        raise AttentionError(
            f"cu_seq_lens go with one row of packed tokens, not with a batch of {B}; flatten it to [1, B * S]"
        )
    cu_k = cu_q if cu_k is None else cu_k
    key_ = (Sq, Sk, causal, window)
    known = _remembered(cu_q, key_)
    if known is None:
        limits = (Sq if max_q is None else int(max_q), Sk if max_k is None else int(max_k))
        known = packed(1, Sq, Sk, cu_q.to(query.device), cu_k.to(query.device), *limits, bool(causal), window)
        _remember(cu_q, key_, known)
    return known


def positions_in(cu: Tensor, query: Tensor, ids: Tensor | None) -> Tensor | None:
    """Positions [1, S] counted inside each of the documents that ``cu [N + 1]`` gives: what tells them apart where a
    mask says the rest. ``ids`` where they don't apply (several rows, or queries that are not all the keys)."""
    S = query.shape[2]
    if query.shape[0] != 1 or S < 2:
        return ids
    known = _remembered(cu, ("positions", S))
    if known is None:
        index = torch.arange(S, device=cu.device)
        known = (index - cu[torch.searchsorted(cu, index, right=True) - 1])[None]
        _remember(cu, ("positions", S), known)
    return known


def _usable(ids: Tensor | None, query: Tensor) -> bool:
    """Positions that can tell documents apart: [B or 1, Sq] integers (some families leak 3-D ones, or none)."""
    return (
        ids is not None
        and ids.dim() == 2
        and ids.shape[1] == query.shape[2] > 1
        and ids.shape[0] in (1, query.shape[0])
    )


def keep_layout(mask: Tensor, layout: Layout) -> None:
    """Let all layers share the ``layout`` of a bool mask [B, 1, 1, Sk], and what it works out."""
    setattr(mask, _KEPT, (_is_recorded(mask), layout))


def _kept(mask: Tensor, B: int, Sk: int) -> Layout | None:
    """What :func:`keep_layout` kept with the mask, unless the mask was written to since."""
    kept: tuple[bool, Layout] | None = getattr(mask, _KEPT, None)
    # a CUDA graph works out everything itself, whatever its inputs will hold when it runs again
    if kept is None or (not kept[0] and _is_recorded(mask)) or not (mask.is_inference() or mask._version == 0):
        return None
    layout = kept[1]
    return layout if (layout.batch, layout.kv_len) == (B, Sk) else None


def _is_recorded(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _remembered(tensor: Tensor, key: Any) -> Any:
    """What :func:`_remember` kept with the tensor, unless it was written to since."""
    if _is_recorded(tensor):
        return None  # a CUDA graph must work out everything from the tensor, whatever it will hold at replay
    kept = getattr(tensor, "_hf_attn_layouts", None)
    if kept is None or (not tensor.is_inference() and kept[0] != tensor._version):
        return None
    return kept[1].get(key)


def _remember(tensor: Tensor, key: Any, known: Any) -> None:
    version = 0 if tensor.is_inference() else tensor._version
    kept: tuple[int, dict[Any, Any]] = getattr(tensor, "_hf_attn_layouts", (-1, {}))
    if kept[0] != version:
        kept = (version, {})
        setattr(tensor, "_hf_attn_layouts", kept)  # noqa: B010 - not an attribute that Tensor declares
    kept[1][key] = known
