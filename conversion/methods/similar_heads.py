"""Which KV heads to merge with which: groups of equal size, of heads that lose little together.

The order of heads is free (a permutation of whole heads across Q, K, V and O changes nothing) except where a head's
index means something, as with ALiBi. The loss of a pair is what aligned merging of the two would lose, keys and values
each relative to all that the layer has; groups are improved by swaps until none helps.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from hf_attn_patch.conversion.families.head_layouts import AttentionWeights
from hf_attn_patch.grouping import KVGrouping

from .align import extended, planes, root


def pair_losses(
    weights: AttentionWeights, *, moment: Tensor | None = None, memory_moment: Tensor | None = None
) -> Tensor:
    """What merging each pair of KV heads would lose, as a share of the layer's keys plus that of its values.

    Arguments as for :func:`~hf_attn_patch.conversion.methods.align.merge_aligned`.

    Returns:
        [HKV, HKV], symmetric, fp64, on the CPU.
    """
    layer, q, k, v, o = weights.layer, weights.q, weights.k, weights.v, weights.o
    if q is None or k is None or v is None or o is None:
        raise ValueError(f"{layer.prefix}: grouping needs q, k, v and o of the layer")
    moment = None if moment is None else moment.to(q.device, torch.float64)
    memory_moment = moment if memory_moment is None else memory_moment.to(q.device, torch.float64)
    query, key = extended(q, weights.q_bias).unflatten(0, (len(k), -1)), extended(k, weights.k_bias)
    output = o.double().unflatten(0, (len(k), -1))
    energies = [
        _pairs(extended(v, weights.v_bias), torch.einsum("hged,hgef->hdf", output, output), memory_moment),
    ]
    first, second = planes(layer.rope, layer.rotary_dims)
    lost_keys = torch.zeros_like(energies[0][0])
    all_keys = torch.zeros_like(energies[0][1])
    if len(first):
        turned = torch.complex(key[:, first], key[:, second]).transpose(0, 1)[:, :, None]  # [P, HKV, 1, E]
        partner = torch.complex(query[:, :, first], query[:, :, second])
        seen = partner if moment is None else partner @ moment.to(partner.dtype)
        gram = (seen * partner.conj()).sum(-1).real.sum(1).T[:, :, None, None].to(turned.dtype)
        lost, total = _pairs(turned, gram, memory_moment)
        lost_keys, all_keys = lost_keys + lost.sum(0), all_keys + total.sum(0)
    if 2 * len(first) < layer.head_dim:
        free = slice(2 * len(first), None)
        partner = query[:, :, free]
        seen = partner if moment is None else partner @ moment
        lost, total = _pairs(key[:, free], torch.einsum("hgde,hgfe->hdf", seen, partner), memory_moment)
        lost_keys, all_keys = lost_keys + lost, all_keys + total
    energies.append((lost_keys, all_keys))
    shares = [lost / total.clamp_min(torch.finfo(torch.float64).tiny) for lost, total in energies]
    return (shares[0] + shares[1]).cpu()


def _pairs(x: Tensor, gram: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """What pairs of heads lose in one head, [..., H, H], and what there is, [...]; x [..., H, D, E]."""
    H, D, E = x.shape[-3:]
    weighted = (root(gram) @ x).reshape(*x.shape[:-3], H * D, E)
    seen = weighted if moment is None else weighted @ moment.to(weighted.dtype)
    full = (seen @ weighted.mH).reshape(*x.shape[:-3], H, D, H, D)
    lost = torch.zeros(*x.shape[:-3], H, H, dtype=torch.float64, device=x.device)
    for i, j in combinations(range(H), 2):
        pair = full[..., [i, j], :, :, :][..., [i, j], :].reshape(*x.shape[:-3], 2 * D, 2 * D)
        values = torch.linalg.eigvalsh(pair)
        lost[..., i, j] = lost[..., j, i] = values[..., :D].clamp_min(0).sum(-1)
    total = torch.einsum("...hdhd->...", full).real
    return lost, total


def similar_order(losses: Tensor, groups: int) -> list[int]:
    """An order of the heads whose consecutive equal groups lose little together.

    Args:
        losses: [H, H], symmetric.

    >>> losses = torch.tensor([[0, 9, 1, 9], [9, 0, 9, 1], [1, 9, 0, 9], [9, 1, 9, 0]])
    >>> similar_order(losses, 2)
    [0, 2, 1, 3]
    """
    H = losses.shape[0]
    size = KVGrouping(H, groups).group_size
    cost = losses.tolist()
    parts = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    improved = True
    while improved:
        improved = False
        for a, b in combinations(range(groups), 2):
            best, swap = -1e-12, None
            for i in parts[a]:
                for j in parts[b]:
                    change = sum(cost[j][k] - cost[i][k] for k in parts[a] if k != i)
                    change += sum(cost[i][k] - cost[j][k] for k in parts[b] if k != j)
                    if change < best:
                        best, swap = change, (i, j)
            if swap:
                parts[a][parts[a].index(swap[0])], parts[b][parts[b].index(swap[1])] = swap[1], swap[0]
                improved = True
    return [h for part in sorted(sorted(p) for p in parts) for h in part]
