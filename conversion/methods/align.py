"""Merge KV heads after turning them into one common basis.

A KV head may be written in many bases without changing what its layer computes: an invertible M on V with its inverse
on the query heads' part of W_O; the same between K and Q without RoPE; with RoPE, in every plane, a complex factor. So
heads are not averaged as they stand (they are nearly orthogonal, and pooling them leaves little of each) but replaced
by the one head from which all of them are best recovered, each by its own change of basis, which its query heads (for
K) or its part of W_O (for V) then carry.

For a group of heads X_h [D, E] with partners of Gram matrix P_h [D, D] (Q C Q^T for keys, O^T O for values) and inputs
of second moment C = E[x x^T], the shared head Z [D, E] and the mixes B_h [D, D] minimise

    sum_h  E | P_h^(1/2) (X_h - B_h Z) x |^2

whose solution is the D leading eigenvectors of the [sD, sD] Gram matrix A C A^T with A_h = P_h^(1/2) X_h. With C = I
only the weights count. A rotary plane is the same with complex numbers and D = 1.

Known of old for values (Procrustes: arXiv 2412.20677; SVD of V and O: 2406.07056); the eigenproblem in this form needs
neither a root nor an inverse of C, so a rank-deficient C does no harm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.conversion.families.head_layouts import AttentionWeights
from hf_attn_patch.conversion.families.layer import LayerAttention
from hf_attn_patch.conversion.families.table import RopeKind

from .mean import mean_of


def shared_head(heads: Tensor, partner_gram: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """The head from which all heads of a group are best recovered, and how.

    Args:
        heads: X [..., s, D, E], real or complex fp64.
        partner_gram: P [..., s, D, D], Hermitian, positive semi-definite.
        moment: C [E, E] real, or None for the identity.

    Returns:
        Z [..., D, E] and B [..., s, D, D], with X_h ~ B_h @ Z. Rows of Z have unit second moment.
    """
    s, D, E = heads.shape[-3:]
    weighted = root(partner_gram) @ heads
    weighted = weighted.reshape(*heads.shape[:-3], s * D, E)
    seen = weighted if moment is None else weighted @ moment.to(weighted.dtype)
    values, vectors = torch.linalg.eigh(seen @ weighted.mH)
    values, vectors = values[..., -D:].flip(-1), vectors[..., -D:].flip(-1)
    # directions that carry nothing (heads equal up to rank, dead heads) get no weight instead of 1/0
    floor = values[..., :1].clamp_min(torch.finfo(values.dtype).tiny) * 1e-14
    scale = torch.where(values > floor, values.clamp_min(floor).rsqrt(), 0.0)
    basis = vectors * scale[..., None, :]
    shared = basis.mH @ weighted
    mixes = heads @ (seen.mH @ basis)[..., None, :, :]
    return shared, mixes


def root(gram: Tensor) -> Tensor:
    """The positive semi-definite square root of Hermitian matrices [..., D, D]."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mH


def planes(rope: RopeKind, dims: int) -> tuple[Tensor, Tensor]:
    """The two dimensions of each plane that RoPE turns, each [dims // 2].

    >>> [t.tolist() for t in planes("half", 4)], [t.tolist() for t in planes("interleaved", 4)]
    ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    """
    i = torch.arange(0 if rope == "none" else dims)
    if rope == "half":
        return i[: len(i) // 2], i[len(i) // 2 :]
    return i[0::2], i[1::2]


def extended(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[H, D, E] and [H, D] as [H, D, E + 1] in fp64: the bias is the weight of an input that is always 1."""
    column = torch.zeros_like(weight[..., 0]) if bias is None else bias
    return torch.cat([weight, column[..., None]], -1).double()


def merge_aligned(
    weights: AttentionWeights,
    *,
    moment: Tensor | None = None,
    memory_moment: Tensor | None = None,
    align_keys: bool = True,
    align_values: bool = True,
) -> AttentionWeights:
    """Merge neighbouring KV heads down to ``weights.layer.new_kv_heads``, aligned.

    Args:
        weights: one layer, q, k, v and o all there (v may be missing where the keys are the values and nothing is
            aligned); any floating dtype (the work is done in fp64).
        moment: E[x x^T] of the layer's inputs, x extended by a constant 1: [E + 1, E + 1]. None: the identity, that is,
            the weights alone.
        memory_moment: the same of what K and V read, in cross-attention; ``moment`` by default.
        align_keys: False where something between projection and scores knows the basis (a norm): keys are averaged.
        align_values: False where something between values and output does (a gate, a norm): values are averaged.

    Returns:
        The merged layer in the dtype of ``weights``; ``weights`` itself where no number changes.
    """
    layer, q, k, v, o = weights.layer, weights.q, weights.k, weights.v, weights.o
    if not layer.changes:
        return weights
    if q is None or k is None or o is None or (v is None and (align_keys or align_values)):
        raise ValueError(f"{layer.prefix}: aligned merging needs q, k, v and o of the layer")
    moment = None if moment is None else moment.to(k.device, torch.float64)
    memory_moment = moment if memory_moment is None else memory_moment.to(k.device, torch.float64)
    gains = None if weights.k_norm is None else mean_of(weights.k_norm, layer.merged)
    done = replace(weights, k_norm=gains)
    if align_keys:
        done = _with_keys(weights, done, moment, memory_moment)
    else:
        done = replace(done, **_averaged(weights, "k"))
    if align_values:
        return _with_values(weights, done, memory_moment)
    return replace(done, **_averaged(weights, "v"))


def _averaged(weights: AttentionWeights, role: str) -> dict[str, Any]:
    """Keys or values that are not aligned: the mean, in fp64."""
    heads: dict[str, Tensor | None] = {name: getattr(weights, name) for name in (role, f"{role}_bias")}
    return {
        name: None if heads is None else mean_of(heads.double(), weights.layer.merged).to(heads.dtype)
        for name, heads in heads.items()
    }


def _parts(made: Tensor, like: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[H, D, E + 1] in fp64 as a weight and a bias (None where there was none)."""
    made = made.to(like.dtype)
    return made[..., :-1], None if bias is None else made[..., -1]


def _query_heads(layer: LayerAttention, group: range) -> list[int]:
    return [h for i in group for h in layer.grouping.query_heads(i)]


def _with_keys(
    old: AttentionWeights, new: AttentionWeights, moment: Tensor | None, memory_moment: Tensor | None
) -> AttentionWeights:
    """``new`` with q and k of ``old``, merged."""
    layer, q, k = old.layer, old.q, old.k
    assert q is not None and k is not None
    query, key = extended(q, old.q_bias), extended(k, old.k_bias)
    turned, shared = query.clone(), []
    for group in layer.merged:
        heads = _query_heads(layer, group)
        merged, turned[heads] = merge_keys(
            key[list(group)], query[heads], planes(layer.rope, layer.rotary_dims), moment, memory_moment
        )
        shared.append(merged)
    new_q, q_bias = _parts(turned, q, old.q_bias)
    new_k, k_bias = _parts(torch.stack(shared), k, old.k_bias)
    return replace(new, q=new_q, q_bias=q_bias, k=new_k, k_bias=k_bias)


def _with_values(old: AttentionWeights, new: AttentionWeights, moment: Tensor | None) -> AttentionWeights:
    """``new`` with v and o of ``old``, merged."""
    layer, v, o = old.layer, old.v, old.o
    assert v is not None and o is not None
    value, output = extended(v, old.v_bias), o.double()
    turned, shared = torch.empty_like(output), []
    for group in layer.merged:
        heads = _query_heads(layer, group)
        merged, turned[heads] = merge_values(value[list(group)], output[heads], moment)
        shared.append(merged)
    new_v, v_bias = _parts(torch.stack(shared), v, old.v_bias)
    return replace(new, v=new_v, v_bias=v_bias, o=turned.to(o.dtype))


def merge_values(value: Tensor, output: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """One group: value [s, D, E'], output [s * G, E, D] -> shared value [D, E'], new output [s * G, E, D]."""
    output = output.unflatten(0, (len(value), -1))
    gram = torch.einsum("sged,sgef->sdf", output, output)
    shared, mixes = balanced(*shared_head(value, gram, moment), value, gram)
    return shared, torch.einsum("sged,sdf->sgef", output, mixes).flatten(0, 1)


def merge_keys(
    key: Tensor,
    query: Tensor,
    rotary: tuple[Tensor, Tensor],
    q_moment: Tensor | None,
    k_moment: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One group: key [s, D, E'], query [s * G, D, E'] -> shared key [D, E'], new query [s * G, D, E'].

    ``rotary``: the planes, see :func:`planes`; dimensions that are in none of them are free. In a
    plane <q, R k> = Re(conj(q) e^(i t) k) with q and k complex, so k = b z is the same as k = z with q times conj(b).
    """
    s, D, _ = key.shape
    query = query.unflatten(0, (s, -1))
    new_key, new_query = torch.empty_like(key[0]), torch.empty_like(query)
    first, second = rotary
    turned_dims = 2 * len(first)
    if turned_dims:
        k = torch.complex(key[:, first], key[:, second]).transpose(0, 1)[:, :, None]  # [P, s, 1, E]
        q = torch.complex(query[:, :, first], query[:, :, second])  # [s, G, P, E]
        seen = q if q_moment is None else q @ q_moment.to(q.dtype)
        gram = (seen * q.conj()).sum(-1).real.sum(1).T[:, :, None, None].to(k.dtype)  # [P, s, 1, 1]
        shared, mixes = balanced(*shared_head(k, gram, k_moment), k, gram)
        z, b = shared[:, 0], mixes[:, :, 0, 0].T[:, None, :, None]  # [P, E], [s, 1, P, 1]
        new_key[first], new_key[second] = z.real, z.imag
        turned = q * b.conj()
        new_query[:, :, first], new_query[:, :, second] = turned.real, turned.imag
    if turned_dims < D:
        free = slice(turned_dims, D)
        k, q = key[:, free], query[:, :, free]
        seen = q if q_moment is None else q @ q_moment
        gram = torch.einsum("sgde,sgfe->sdf", seen, q)
        shared, mixes = balanced(*shared_head(k, gram, k_moment), k, gram)
        new_key[free] = shared
        new_query[:, :, free] = torch.einsum("sdf,sgde->sgfe", mixes, q)
    return new_key, new_query.flatten(0, 1)


def balanced(shared: Tensor, mixes: Tensor, heads: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the rows of the shared head, and the mixes against them, to what the heads had.

    The product is the same for any scale; training is not, since an optimiser's step does not scale with the weights.
    Each row keeps the ratio that keys and queries (values and outputs) had before.
    """
    tiny = torch.finfo(torch.float64).tiny
    size = shared.abs().square().sum(-1)  # [..., D]
    partner = torch.einsum("...sdi,...sde,...sei->...i", mixes.conj(), gram, mixes).real / heads.shape[-3]
    before = heads.abs().square().sum((-1, -2)).mean(-1)
    partner_before = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1).mean(-1)
    ratio = (before / partner_before.clamp_min(tiny))[..., None]
    factor = (ratio * partner / size.clamp_min(tiny)).pow(0.25)
    factor = torch.where((factor > 0) & factor.isfinite(), factor, 1.0)
    return shared * factor[..., :, None], mixes / factor[..., None, None, :]
