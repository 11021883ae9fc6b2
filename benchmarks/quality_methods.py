"""What ``quality.py`` compares, by name: how a model is converted, and by what recipe it is uptrained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.code_lm import Recipe, autocast
from hf_attn_patch.conversion.calibration.refit import RefitRecipe, refit
from hf_attn_patch.conversion.families.head_layouts import AttentionWeights
from hf_attn_patch.conversion.families.layer import LayerAttention, stack_layers
from hf_attn_patch.conversion.families.table import Stack
from hf_attn_patch.conversion.methods.align import merge_aligned
from hf_attn_patch.conversion.methods.aligned import permuted
from hf_attn_patch.conversion.methods.mean import first_of, mean_of
from hf_attn_patch.conversion.methods.similar_heads import pair_losses, similar_order


@dataclass(frozen=True)
class Conversion:
    """A conversion by name: how heads are merged, on what text, and what is fitted after."""

    merge: str  # mean | first | random | aligned
    calibrated: bool = False
    refit: RefitRecipe | None = None
    tokens: int = 500_000  # calibration text; at most 1% of the pretraining tokens
    similar: bool = False  # heads grouped by what they lose together


METHODS = {
    "random": Conversion("random"),
    "first": Conversion("first"),
    "mean": Conversion("mean"),
    "aligned": Conversion("aligned"),
    "calibrated": Conversion("aligned", True),
    "similar": Conversion("aligned", True, similar=True),
    "mean+refit": Conversion("mean", False, RefitRecipe()),
    "calibrated+refit": Conversion("aligned", True, RefitRecipe()),
}

#: how models are uptrained: tokens and the loss are filled in
RECIPES = {
    "plain": Recipe(0, 16_384, 5e-4, warmup=0.1),
}


def varied(text: str, known: dict[str, Any]) -> Any:
    """``NAME:field=value:...``: an entry of ``known`` with fields of its own, or of its refit, changed."""
    name, *changes = text.split(":")
    found = known[name]
    for change in changes:
        key, value = change.split("=")
        refitted: Any = getattr(found, "refit", None)
        owner = found if hasattr(found, key) else refitted
        old = getattr(owner, key)
        new = value == "True" if isinstance(old, bool) else type(old)(float(value) if isinstance(old, int) else value)
        found = (
            replace(found, **{key: new}) if owner is found else replace(found, refit=replace(refitted, **{key: new}))
        )
    return found


def heads_of(attention: Any, layer: LayerAttention) -> AttentionWeights:
    """The projections of a Llama attention module, head by head."""
    D = layer.head_dim
    q, k, v = (getattr(attention, n).weight.detach().unflatten(0, (-1, D)) for n in ("q_proj", "k_proj", "v_proj"))
    return AttentionWeights(
        layer, q=q, k=k, v=v, o=attention.o_proj.weight.detach().unflatten(1, (-1, D)).transpose(0, 1)
    )


@torch.no_grad()
def moments(model: LlamaForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    """E[x x^T] of what every layer's attention reads, x extended by 1; fp64 sums."""
    E = model.config.hidden_size
    sums = [torch.zeros(E + 1, E + 1, dtype=torch.float64, device=ids.device) for _ in model.model.layers]
    hooks = []
    for total, layer in zip(sums, model.model.layers, strict=True):

        def add(_m: Any, _args: Any, kwargs: dict[str, Any], total: torch.Tensor = total) -> None:
            x = kwargs["hidden_states"].flatten(0, -2).float()
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            total += (x.T @ x).double()

        hooks.append(layer.self_attn.register_forward_pre_hook(add, with_kwargs=True))
    for block in ids.split(16):
        with autocast(ids.device):
            model.model(input_ids=block, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [total / ids.numel() for total in sums]


def convert(model: LlamaForCausalLM, kv_heads: int, how: Conversion, ids: torch.Tensor, seed: int) -> LlamaForCausalLM:
    """A copy of ``model`` with ``kv_heads`` KV heads; ``ids`` [N, S] is the calibration text."""
    config = replace_config(model, kv_heads)
    student = LlamaForCausalLM(config).to(ids.device).eval()
    state = model.state_dict()
    student.load_state_dict({k: v for k, v in state.items() if ".k_proj" not in k and ".v_proj" not in k}, strict=False)
    known = moments(model, ids) if how.calibrated else [None] * len(model.model.layers)
    layers = [replace(x, new_kv_heads=kv_heads) for x in stack_layers(Stack(), model.config, "the base model")]
    generator = torch.Generator().manual_seed(seed)
    new: Any
    for new, old, layer, moment in zip(student.model.layers, model.model.layers, layers, known, strict=True):
        weights = heads_of(old.self_attn, layer)
        if how.similar:
            weights = permuted(weights, similar_order(pair_losses(weights, moment=moment), kv_heads))
        k, v = weights.k, weights.v
        assert k is not None and v is not None
        if how.merge == "aligned":
            weights = merge_aligned(weights, moment=moment)
        elif how.merge == "random":
            shape = (kv_heads, *k.shape[1:])
            drawn = [torch.randn(shape, generator=generator).to(k) * 0.02 for _ in range(2)]
            weights = replace(weights, k=drawn[0], v=drawn[1])
        else:
            pool = mean_of if how.merge == "mean" else first_of
            weights = replace(weights, k=pool(k, layer.merged), v=pool(v, layer.merged))
        assert weights.o is not None
        with torch.no_grad():
            for name in "qkv":
                getattr(new.self_attn, f"{name}_proj").weight.copy_(getattr(weights, name).flatten(0, 1))
            new.self_attn.o_proj.weight.copy_(weights.o.transpose(0, 1).flatten(1))
    if how.refit:
        refit(
            model,
            student.model.layers,
            model.model.layers,
            ids,
            how.refit,
            trained=lambda layer: list(layer.get_submodule("self_attn").parameters()),
            autocast=lambda: autocast(ids.device),
            noise=1e-5 if ids.is_cuda else 1e-10,
        )
    return student


def replace_config(model: LlamaForCausalLM, kv_heads: int) -> Any:
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_key_value_heads = kv_heads
    return config
