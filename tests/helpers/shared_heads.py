"""Checkpoints whose KV heads are one head a group, each in a basis of its own: merging in one basis loses nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_attn_patch.conversion.methods.apply import from_heads, to_heads
from hf_attn_patch.conversion.plan_data import Plan

#: a norm between projection and scores knows the basis of K: there heads are made equal instead
KEYS_HAVE_A_NORM = {
    "qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3", "olmoe", "stablelm",
    "cohere", "exaone4", "exaone_moe", "apertus", "flex_olmo", "hunyuan_v1_dense", "minimax_m2",
}  # fmt: skip


def random_turns(rope: str, rotary: int, heads: int, D: int) -> torch.Tensor:
    """[heads, D, D]: a turn and a scale in each rotary plane, any rotation among the free dimensions."""
    turns = torch.zeros(heads, D, D)
    for h in range(heads):
        for j in range(rotary // 2):
            a, b = (j, j + rotary // 2) if rope == "half" else (2 * j, 2 * j + 1)
            angle, scale = 6.3 * torch.rand(()), 0.5 + torch.rand(())
            turns[h, a, a] = turns[h, b, b] = scale * angle.cos()
            turns[h, a, b], turns[h, b, a] = -scale * angle.sin(), scale * angle.sin()
        free = D - rotary
        turns[h, rotary:, rotary:] = torch.linalg.qr(torch.randn(free, free))[0]
    return turns


def share_heads(made: Plan, folder: Path, new: int, keys: bool, values: bool = True) -> None:
    """Rewrite the checkpoint so that the KV heads of each group are one head, each in a basis of its own."""
    state = load_file(folder / "model.safetensors")
    for unit in made.units:
        layer = unit.layer
        weights = to_heads(unit, {name: state[name] for name in unit.reads})
        D, HKV = layer.head_dim, layer.kv_heads
        new = layer.new_kv_heads
        of = [h - h % (HKV // new) for h in range(HKV)]
        turns = {
            "k": random_turns(layer.rope, layer.rotary_dims, HKV, D) if keys else torch.eye(D).expand(HKV, D, D),
            "v": torch.linalg.qr(torch.randn(HKV, layer.value_dim, layer.value_dim))[0],
        }
        if not values:
            turns["v"] = torch.eye(layer.value_dim).expand(HKV, -1, -1)
        for name, M in turns.items():
            if getattr(weights, name) is None:  # values that are the keys
                continue
            setattr(weights, name, M @ getattr(weights, name)[of])
            if getattr(weights, f"{name}_bias") is not None:
                setattr(weights, f"{name}_bias", (M @ getattr(weights, f"{name}_bias")[of][..., None])[..., 0])
        if weights.k_norm is not None:
            weights.k_norm = weights.k_norm[of]
        same = replace(layer, new_kv_heads=HKV)
        state.update({n: t.contiguous() for n, t in from_heads(replace(unit, layer=same), weights).items()})
    save_file(state, folder / "model.safetensors", {"format": "pt"})
