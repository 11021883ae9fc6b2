"""Requests in the pages of a cache, and what their attention is, by plain indexing."""

from __future__ import annotations

import torch
from torch import Tensor


class PagedRequests:
    """R requests of ``lengths`` keys (the new one included; 0 is padding) in shuffled pages of random numbers."""

    def __init__(
        self, lengths: list[int], page: int, HQ: int, HKV: int, D: int, device: str, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        most = max(-(-n // page) for n in lengths) + 1
        total = sum(-(-n // page) for n in lengths) + 2
        free = torch.randperm(total, generator=generator).tolist()
        rows = [[free.pop() for _ in range(-(-n // page))] for n in lengths]
        self.table = torch.tensor([r + [-1] * (most - len(r)) for r in rows], dtype=torch.int32, device=device)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        R = len(lengths)
        self.lengths, self.page = lengths, page
        self.pages = [randn(total, page, HKV, D) for _ in "kv"]
        self.query, self.key, self.value = randn(1, HQ, R, D), randn(1, HKV, R, D), randn(1, HKV, R, D)
        self.cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)

    def truth(self, dtype: torch.dtype) -> Tensor:
        """[1, R, HQ, D]: each request's keys, taken page by page, its newest one last."""
        G = self.query.shape[1] // self.key.shape[1]
        outs = []
        for r, n in enumerate(self.lengths):
            q = self.query[0, :, r].to(dtype)
            if n == 0:
                outs.append(torch.zeros_like(q))
                continue
            sides = []
            for pages, new in zip(self.pages, (self.key, self.value), strict=True):
                old = [pages[self.table[r, j // self.page], j % self.page] for j in range(n - 1)]
                sides.append(torch.stack([*old, new[0, :, r]]).to(dtype).repeat_interleave(G, 1))
            scores = torch.einsum("hd,jhd->hj", q, sides[0]) * q.shape[-1] ** -0.5
            outs.append(torch.einsum("hj,jhd->hd", torch.softmax(scores, -1), sides[1]))
        return torch.stack(outs)[None]
