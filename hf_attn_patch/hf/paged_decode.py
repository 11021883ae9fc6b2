"""Continuous batching, one token a request, where transformers hands a block table: pages are read where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn_patch.attn.devices import interpreted
from hf_attn_patch.errors import AttentionError


def paged_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    cu_seq_lens_k: Tensor,
    *,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Write each request's new key and value into its pages, and let its query see all of them.

    Args:
        query: [1, HQ, R, D], one token of each of R requests. key, value: [1, HKV, R, D], theirs.
        k_pages, v_pages: [pages, page, HKV, D], written to.
        table: [R, most pages] integers; entries beyond a request's length are not read.
        cu_seq_lens_k: [R + 1], with the new token; requests of no keys (padding, after the others) give zeros.

    Returns:
        [1, R, HQ, D].

    Raises:
        AttentionError: our Triton kernel cannot run here.
    """
    requests = table.shape[0]
    if query.shape[2] != requests or cu_seq_lens_k.shape[0] != requests + 1:
        raise AttentionError(
            f"a block table of {requests} requests came with {query.shape[2]} queries and "
            f"{cu_seq_lens_k.shape[0] - 1} lengths; one of each a request is wanted"
        )
    if query.device.type != "cuda" and not interpreted():
        raise AttentionError(
            "this paged cache wants its block table to be read by the kernel, which needs a CUDA device; set "
            "max_blocks_per_request=0 in the continuous batching config"
        )
    from hf_attn_patch.attn.kernels.decode import grouped_decode_paged  # needs triton

    lengths = cu_seq_lens_k.diff().to(torch.int32)
    row = torch.arange(requests, device=query.device)
    row = torch.where(lengths > 0, row, 0)  # padding writes the first request's token once more
    position = lengths[row].long() - 1
    page = k_pages.shape[1]
    where = (table[row, position // page].long(), position % page)
    for pages, new in ((k_pages, key), (v_pages, value)):
        pages.index_put_(where, new.squeeze(0).transpose(0, 1)[row].to(pages.dtype))
    q = query.squeeze(0).transpose(0, 1)[:, :, None]  # [R, HQ, 1, D]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.no_grad():
        out = grouped_decode_paged(
            q, k_pages, v_pages, table.to(torch.int32), lengths, scale=scale, softcap=softcap, sinks=sinks
        )
    assert isinstance(out, Tensor)
    return out.squeeze(2)[None]
