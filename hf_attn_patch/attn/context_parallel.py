"""Context parallelism: each process holds a part of every sequence, and its queries see the keys of all parts.

Keys and values are gathered and put in order, which costs G times less than it would for the query heads; a query is
then computed where it is, over whole rows, so that windows, softcaps, sinks and documents are what they are on one
process. Backward, each process's part of the gradient is the sum over all, in fp32.

Shapes: S tokens in all, n of them here. W processes. With ``balanced`` this one holds two chunks, number ``rank`` and
number ``2 W - 1 - rank`` of 2 W; else one of W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_attn_patch.compat.context_parallel import Split, all_gather, context_parallel, own_attention, reduce_scatter
from hf_attn_patch.errors import AttentionError

from .visibility import Dense, Full, Packed, Visibility, full


def refuse_parts(name: str) -> None:
    """For functions that see nothing but the tensors that they are given.

    Raises:
        AttentionError: those are parts of a split text.
    """
    if functional.scaled_dot_product_attention is not own_attention and context_parallel() is not None:
        raise AttentionError(
            f"{name}() under context_parallel would see this process's part of the keys alone; call it outside, or let "
            "a model of transformers call it"
        )


class _Gathered(torch.autograd.Function):
    """[W, ...] of every process's [...]; backward the sum over processes of what concerns this one's."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return gathered(mine, split)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        wide = gradient if gradient.dtype is torch.float64 else gradient.float()
        mine = wide.new_empty(wide[0].numel())
        reduce_scatter(mine, wide.flatten(), group=ctx.split.group)
        return mine.view(wide.shape[1:]).to(gradient.dtype), None


def gathered(mine: Tensor, split: Split) -> Tensor:
    """[W, ...] of every process's [...], without a gradient."""
    everybodys = mine.new_empty(split.size * mine.numel())
    all_gather(everybodys, mine.flatten(), group=split.group)
    return everybodys.view(split.size, *mine.shape)


def in_order(parts: Tensor, dim: int, split: Split) -> Tensor:
    """[W, ..., n, ...] of all processes in the order of the text: [..., S, ...], where ``dim`` is that of n.

    >>> split = Split(None, 0, 2, balanced=True)
    >>> in_order(torch.tensor([[0, 1, 6, 7], [2, 3, 4, 5]]), 0, split)
    tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    if not split.balanced:
        return torch.cat(list(parts), dim)
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([first for first, _ in halves] + [last for _, last in reversed(halves)], dim)


def chunks(n: int, split: Split) -> list[tuple[int, int]]:
    """(First, last + 1) token of each chunk that this process holds, in the order in which it holds them.

    >>> chunks(4, Split(None, 0, 2, balanced=True)), chunks(4, Split(None, 1, 2, balanced=False))
    ([(0, 2), (6, 8)], [(4, 8)])
    """
    if not split.balanced:
        return [(split.rank * n, (split.rank + 1) * n)]
    return [(i * n // 2, (i + 1) * n // 2) for i in (split.rank, 2 * split.size - 1 - split.rank)]


def whole_keys(k: Tensor, v: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """[B, HKV, S, D] and [B, HKV, S, Dv] from every process's k [B, HKV, n, D] and v [B, HKV, n, Dv]: one exchange."""
    both: Tensor = _Gathered.apply(torch.cat([k.flatten(), v.flatten()]), split)  # type: ignore[no-untyped-call]
    ks, vs = both.split([k.numel(), v.numel()], 1)
    return tuple(in_order(t.view(split.size, *x.shape), 2, split) for t, x in ((ks, k), (vs, v)))  # type: ignore[return-value]


def rows_of(seen: Visibility, first: int, last: int) -> Visibility:
    """What the queries ``first`` to ``last`` of a causal text see of its keys up to ``last``.

    Raises:
        AttentionError: rows with padding, of which no part is known to be a form that kernels take.

    >>> rows_of(full(8, 8, True, (None, None)), 2, 4)
    Full(batch=1, q_len=2, kv_len=4, causal=True, window=(None, None), start=0, stop=4)
    """
    n = last - first
    if isinstance(seen, Dense):
        return Dense(seen.batch, n, last, mask=seen.mask[:, :, first:last, :last])
    if isinstance(seen, Full):
        return full(n, last, True, seen.window, seen.batch)
    if not isinstance(seen, Packed) or seen.padding is not None:
        raise AttentionError("padding cannot be split by context_parallel")
    B = seen.batch
    rows = torch.arange(B, device=seen.cu_q.device, dtype=torch.int32)[:, None]
    within = (seen.cu_q - rows * seen.q_len).clamp(0, seen.q_len)  # [B, N + 1]: each row's share of the borders

    def flat(low: int, high: int) -> Tensor:
        """Borders over the flattened tokens of [B, high - low]; documents of no tokens are in other rows or chunks."""
        mine = within.clamp(low, high) - low + rows * (high - low)
        return mine.flatten()

    return Packed(
        B, n, last, n > 1, seen.window, cu_q=flat(first, last), cu_k=flat(0, last),
        max_q=min(seen.max_q, n), max_k=min(seen.max_k, last),
    )  # fmt: skip
