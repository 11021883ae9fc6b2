"""The methods ``aligned`` and ``calibrated`` as the conversion engine calls them: one layer at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from hf_attn_patch.conversion.families.accounts import norm_on_keys
from hf_attn_patch.conversion.families.head_layouts import AttentionWeights
from hf_attn_patch.errors import ConversionError

from .align import merge_aligned
from .similar_heads import pair_losses, similar_order

if TYPE_CHECKING:
    from hf_attn_patch.conversion.families.layer import LayerAttention
    from hf_attn_patch.conversion.plan_data import Plan

GROUPINGS = ("adjacent", "similar")


class Aligned:
    """A merge of whole layers. ``record`` tells what could not be aligned and which heads went together.

    Args:
        plan: tells where norms stand between projection and scores.
        group: ``adjacent`` merges neighbours; ``similar`` first permutes the heads so that those go together that lose
            least (not where a head's index means something: there it is ``adjacent``).

    Attributes:
        moments: E[x x^T] by layer prefix, where they are known (see
            :func:`~hf_attn_patch.conversion.methods.align.merge_aligned`);
            what K and V read under ``(prefix, "memory")``.
    """

    def __init__(self, plan: Plan, group: str = "adjacent") -> None:
        if group not in GROUPINGS:
            raise ConversionError(f"--group {group!r}: choose one of {', '.join(GROUPINGS)}")
        self.group = group
        self.moments: dict[Any, torch.Tensor] = {}
        self.normed = {layer.prefix for layer in plan.layers if norm_on_keys(plan.source.tensors, layer)}
        self.record: dict[str, Any] = {
            "group": group, "keys_averaged": [], "values_averaged": [], "order": {}, "notes": [],
        }  # fmt: skip
        changed = [layer for layer in plan.layers if layer.changes]
        told = (
            ("keys", "a norm after them", sum(layer.prefix in self.normed for layer in changed)),
            ("values", "what stands between them and the output", sum(layer.values_fixed for layer in changed)),
        )
        for what, why, count in told:
            if count:
                self.record["notes"].append(
                    f"the {what} of {count} layers are averaged, not aligned, because {why} depends on their basis:"
                    " --calibrate TEXT keeps more"
                )

    def known(self, layer: LayerAttention) -> dict[str, Any]:
        """The moments of a layer's inputs, by the names that ``merge_aligned`` knows them by."""
        return {"moment": self.moments.get(layer.prefix), "memory_moment": self.moments.get((layer.prefix, "memory"))}

    def __call__(self, weights: AttentionWeights) -> AttentionWeights:
        layer = weights.layer
        if not layer.changes:
            return weights
        known = self.known(layer)
        movable = not (layer.fixed_heads or layer.stack.ordered_heads or weights.v is None)
        if self.group == "similar" and movable:
            order = similar_order(pair_losses(weights, **known), layer.new_kv_heads)
            weights = permuted(weights, order)
            self.record["order"][layer.prefix] = order
        align_keys = layer.prefix not in self.normed
        if not align_keys:
            self.record["keys_averaged"].append(layer.prefix)
        if layer.values_fixed:
            self.record["values_averaged"].append(layer.prefix)
        return merge_aligned(weights, align_keys=align_keys, align_values=not layer.values_fixed, **known)


def permuted(weights: AttentionWeights, order: list[int]) -> AttentionWeights:
    """KV heads in a new order, each with its query heads, norms' gains and sinks: the same function.

    Args:
        order: for each new place the KV head that goes there.
    """
    grouping = weights.layer.grouping
    if sorted(order) != list(range(grouping.num_kv_heads)):
        raise ValueError(f"{order} is no order of {grouping.num_kv_heads} KV heads")
    queries = [h for i in order for h in grouping.query_heads(i)]
    changed: dict[str, Any] = {}
    for name in ("q", "q_bias", "g", "g_bias", "o", "q_norm", "sinks", "k", "k_bias", "v", "v_bias", "k_norm"):
        heads = getattr(weights, name)
        if heads is not None:
            changed[name] = heads[order if name[0] in "kv" else queries]
    return replace(weights, **changed)
