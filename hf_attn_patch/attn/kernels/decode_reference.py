"""What the decode kernels compute, in plain PyTorch: every score written out, no tricks."""

from __future__ import annotations

import torch


def grouped_decode_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    first: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``grouped_decode(..., return_lse=True)`` in the dtype of its inputs, for any Sq.

    q: [B, HQ, Sq, D], k: [B, HKV, Sk, D], v: [B, HKV, Sk, Dv] -> [B, HQ, Sq, Dv] and [B, HQ, Sq].
    """
    B, HQ, Sq, _ = q.shape
    _, HKV, Sk, _ = k.shape
    keys = torch.arange(Sk, device=q.device)
    begin = torch.zeros(B, dtype=torch.long, device=q.device) if first is None else first.long()
    stop = torch.full((B,), Sk, device=q.device) if end is None else end.long()
    visible = (keys >= begin[:, None]) & (keys < stop[:, None])  # [B, Sk]
    visible = visible[:, None, None, :].expand(B, HQ, Sq, Sk)
    if causal:
        last = (stop[:, None] - Sq + torch.arange(Sq, device=q.device))[:, None, :, None]
        visible = visible & (keys <= last)
        if window is not None:
            visible = visible & (keys > last - window)
    if mask is not None:
        visible = visible & mask
    if bias is not None:
        visible = visible & (bias > float("-inf"))

    # What nobody sees may hold anything, NaN too; 0 * NaN would be NaN.
    seen = visible.unflatten(1, (HKV, HQ // HKV)).any(2).any(2)[..., None]  # [B, HKV, Sk, 1]
    k, v = k.masked_fill(~seen, 0), v.masked_fill(~seen, 0)
    k, v = (t.repeat_interleave(HQ // HKV, dim=1) for t in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(B, HQ, Sq, 1)], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    probabilities = torch.softmax(scores, dim=-1).masked_fill(lse[..., None] == float("-inf"), 0)
    return probabilities[..., :Sk] @ v, lse


def grouped_decode_paged_reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    **options: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``grouped_decode_paged(..., return_lse=True)``: gather the pages, then as above."""
    page = k_pages.shape[1]
    used = torch.arange(block_table.shape[1], device=q.device) * page < lengths[:, None]
    table = block_table.long().masked_fill(~used, 0)  # entries past the end name no page
    k, v = (pages[table].flatten(1, 2).transpose(1, 2) for pages in (k_pages, v_pages))
    return grouped_decode_reference(q, k, v, end=lengths, **options)  # type: ignore[arg-type]
