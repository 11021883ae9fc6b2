"""The rows of ``real_models.py``: how a real model gets fewer KV heads, ours and what others do at equal cache bytes.

Shapes: E model width, HQ query heads, HKV KV heads, D head dimension, s KV heads of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_sources import MIX, WIDE
from hf_attn_patch.conversion.calibration.layers import attention_name
from hf_attn_patch.conversion.calibration.moments import Moments
from hf_attn_patch.conversion.families.head_layouts import AttentionWeights
from hf_attn_patch.conversion.methods.align import extended, planes
from hf_attn_patch.conversion.plan_data import Plan


@dataclass(frozen=True)
class Row:
    """A row by name.

    Attributes:
        options: of ``convert``; ``{texts}`` in a value is the folder of texts.
        kind: "convert", "svd" (another cache than GQA's), "procrustes", or "source".
        after: the row whose result is distilled further, and on how many tokens of ``text``.
        kd_lr, kd_batch: peak learning rate of that, and tokens of a step.
        kd_copies: whether its sequences are long and have copies in them, as those of polishing.
    """

    options: tuple[tuple[str, Any], ...] = ()
    kind: str = "convert"
    after: str | None = None
    kd_tokens: int = 0
    text: str | None = None
    kd_lr: float = 4e-4
    kd_batch: int = 16384
    kd_copies: bool = False


def _row(**options: Any) -> Row:
    return Row(tuple(options.items()))


def _of(names: tuple[str, ...]) -> dict[str, Any]:
    return {"calibrate": ",".join(f"{{texts}}/{name}.txt" for name in names), "calibration_tokens": 2_000_000}


MIXED, MORE = _of(MIX), _of(WIDE)
ROWS = {
    "source": Row(kind="source"),
    "first": _row(method="first"),
    "mean": _row(method="mean"),
    "procrustes": Row(kind="procrustes"),
    "svd": Row(kind="svd"),
    "aligned": _row(method="aligned"),
    "merged, own": _row(calibrate="own", calibration_tokens=4096, calibration_length=64, refit=False, polish=0),
    "default": _row(),
    "own": _row(calibrate="own"),
    "own, long": _row(calibration_tokens=2 << 20, polish=16_000_000),
    "kernel": _row(calibrate="{texts}/kernel.txt", calibration_tokens=1 << 20),
    "mix": _row(**MIXED, polish=6_000_000),
    "mix, long": _row(**MIXED, polish=12_000_000),
    "mix + own": _row(calibrate=f"own:4,{MIXED['calibrate']}", calibration_tokens=3_000_000, polish=6_000_000),
    "wide": _row(**MORE, polish=6_000_000),
    "mix, long + KD 2M": Row(after="mix, long", kd_tokens=2_000_000, text="mix"),
    "mix, long + KD 20M": Row(after="mix, long", kd_tokens=20_000_000, text="mix"),
    "wide + KD 20M": Row(after="wide", kd_tokens=20_000_000, text="wide", kd_lr=1e-3, kd_batch=8192, kd_copies=True),
}


@torch.no_grad()
def moments_of(plan: Plan, model: Any, ids: Tensor, rows: int = 8) -> list[Tensor]:
    """E[x x^T] [E + 1, E + 1] of what the attention of each unit reads, x extended by 1."""
    taken = [Moments(model.get_submodule(attention_name(model, u.layer)), u.layer) for u in plan.units]
    for one in taken:
        one.__enter__()
    try:
        for block in ids.split(rows):
            model(input_ids=block.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for one in taken:
            one.__exit__()
    found = [one.results()[0][0] for one in taken]
    return [moment for moment in found if moment is not None]


def procrustes(weights: AttentionWeights, moment: Tensor, rounds: int = 20) -> AttentionWeights:
    """Heads turned towards their mean and averaged: values by orthogonal matrices, keys by a rotation of each plane
    (generalised Procrustes analysis on the layer's inputs; Jin et al. 2024, arXiv 2412.20677)."""
    layer, k, v, q, o = weights.layer, weights.k, weights.v, weights.q, weights.o
    assert k is not None and v is not None and q is not None and o is not None
    values, vectors = torch.linalg.eigh(moment)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    key, value = extended(k, None) @ root, extended(v, None) @ root
    new_q, new_o = q.double().clone(), o.double().clone()
    new_k, new_v = [], []
    first, second = planes(layer.rope, layer.rotary_dims)
    for group in layer.merged:
        kv = list(group)
        turns = _towards_mean(value[kv], rounds)
        new_v.append((turns @ v[kv].double()).mean(0))
        phases = _phases(torch.complex(key[kv][:, first], key[kv][:, second]), rounds)
        turned = torch.complex(k[kv].double()[:, first], k[kv].double()[:, second]) * phases[..., None]
        mean = torch.empty_like(k[0], dtype=torch.float64)
        mean[first], mean[second] = turned.mean(0).real, turned.mean(0).imag
        new_k.append(mean)
        for i, member in enumerate(kv):
            for h in layer.grouping.query_heads(member):
                new_o[h] = new_o[h] @ turns[i].T
                both = torch.complex(q[h].double()[first], q[h].double()[second]) * phases[i][:, None]
                new_q[h][first], new_q[h][second] = both.real, both.imag
    like = q.dtype
    return replace(
        weights, q=new_q.to(like), k=torch.stack(new_k).to(like), v=torch.stack(new_v).to(like), o=new_o.to(like)
    )


def _towards_mean(heads: Tensor, rounds: int) -> Tensor:
    """Orthogonal R [s, D, D] for which the R_h X_h are closest to their mean; X [s, D, E]."""
    s, D, _ = heads.shape
    turns = torch.eye(D, dtype=heads.dtype, device=heads.device).repeat(s, 1, 1)
    for _ in range(rounds):
        mean = (turns @ heads).mean(0)
        left, _, right = torch.linalg.svd(mean @ heads.mT)
        turns = left @ right
    return turns


def _phases(heads: Tensor, rounds: int) -> Tensor:
    """Unit complex numbers c [s, P] for which the c_h x_h are closest to their mean; x [s, P, E] complex."""
    phases = torch.ones(heads.shape[:2], dtype=heads.dtype, device=heads.device)
    for _ in range(rounds):
        mean = (phases[..., None] * heads).mean(0)
        inner = (mean * heads.conj()).sum(-1)
        phases = inner / inner.abs().clamp_min(1e-30)
    return phases


class ProjectedCache:
    """Keys and values as they are after projection to fewer numbers: SVD of what the cache holds (Yu et al. 2024, arXiv
    2406.07056). Keys are projected behind RoPE, heads of a group together: not standard GQA, but as many cache bytes.

    Args:
        model: a causal model whose attention function this replaces.
        groups: the KV heads that are projected together.
        ids: calibration text [N, S].
    """

    NAME = "projected_cache"

    def __init__(self, model: Any, groups: tuple[range, ...], ids: Tensor) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask

        self.groups, self.inner = groups, sdpa_attention_forward
        self.sums: dict[int, list[Tensor]] = {}
        self.bases: dict[int, list[Tensor]] | None = None
        AttentionInterface.register(self.NAME, self.attend)
        AttentionMaskInterface.register(self.NAME, sdpa_mask)
        model.set_attn_implementation(self.NAME)
        with torch.no_grad():
            for block in ids.split(8):
                model(input_ids=block.to(model.device), use_cache=False, logits_to_keep=1)
        D = model.config.head_dim
        self.bases = {
            layer: [torch.linalg.eigh(total)[1][:, -D:].float() for total in totals]
            for layer, totals in self.sums.items()
        }

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        """Attention on keys and values [B, HKV, S, D] as they come back from the smaller cache."""
        done = [self._through(module.layer_idx, which, x) for which, x in enumerate((key, value))]
        return self.inner(module, query, done[0], done[1], mask, **kwargs)

    def _through(self, layer: int, which: int, states: Tensor) -> Tensor:
        out = states.clone()
        for number, group in enumerate(self.groups):
            heads = list(group)
            x = states[:, heads].transpose(1, 2).flatten(2)  # [B, S, s * D]
            place = which * len(self.groups) + number
            if self.bases is None:
                totals = self.sums.setdefault(layer, [])
                rows = x.flatten(0, 1).float()
                gram = (rows.T @ rows).double()
                if place < len(totals):
                    totals[place] += gram
                else:
                    totals.append(gram)
                continue
            basis = self.bases[layer][place].to(x.dtype)
            out[:, heads] = (x @ basis @ basis.T).unflatten(2, (len(heads), -1)).transpose(1, 2)
        return out
