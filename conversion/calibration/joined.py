"""The converted model in memory, beside the original: everything but its attention is the original's own tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_patch.compat.torch import own_tensors
from hf_attn_patch.conversion.families.head_layouts import AttentionWeights
from hf_attn_patch.conversion.methods.aligned import Aligned
from hf_attn_patch.conversion.methods.apply import from_heads, to_heads
from hf_attn_patch.conversion.plan_data import Plan, Unit
from hf_attn_patch.conversion.processes import current

from .layers import attention_name, meta_model
from .moments import Moments


def joined(plan: Plan, original: Any, merged: Mapping[str, AttentionWeights]) -> tuple[Any, dict[str, nn.Parameter]]:
    """The converted model, with its attentions made of ``merged`` (by layer prefix).

    Args:
        original: the source as :func:`~.layers.load` gives it, on any device.

    Returns:
        the model, on the original's device and of its dtype, and the parameters that are its own, by their names in
        the checkpoint.
    """
    student: Any = meta_model(plan)
    like = next(original.parameters())
    own: dict[str, nn.Parameter] = {}
    placed: dict[str, nn.Parameter] = {}
    for unit in plan.units:
        inside, prefix = attention_name(student, unit.layer), unit.layer.prefix
        for name, tensor in from_heads(unit, merged[prefix]).items():
            own[name] = nn.Parameter(tensor.to(like.device, like.dtype).clone(), requires_grad=False)
            placed[f"{inside}.{name.removeprefix(prefix)}"] = own[name]
    known: dict[str, torch.Tensor] = dict(original.named_parameters(remove_duplicate=False))
    known |= dict(original.named_buffers(remove_duplicate=False)) | placed
    for path, module in student.named_modules():
        for kept in own_tensors(module):
            for name, value in kept.items():
                if value is not None:
                    kept[name] = known[f"{path}.{name}" if path else name]
    return student.eval(), own


def heads_of(unit: Unit, tensors: Mapping[str, Tensor], like: AttentionWeights) -> AttentionWeights:
    """The heads in what a unit writes, by the tensors' names in the checkpoint."""
    layer = unit.layer
    done = replace(
        unit,
        layer=replace(layer, kv_heads=layer.new_kv_heads),
        projections=layer.stack.written or layer.stack.projections,
    )
    found = to_heads(done, {name: tensors[name].detach().float().cpu() for name in unit.writes})
    return replace(found, layer=like.layer)


def polished(
    plan: Plan, record: dict[str, Any], merged: dict[str, AttentionWeights], own: Mapping[str, nn.Parameter], *,
    tokens: int, trained: Collection[str], train: Callable[[list[nn.Parameter]], None],
    measure: Callable[[], dict[str, Any]],
) -> dict[str, AttentionWeights]:  # fmt: skip
    """The attentions that :func:`joined` made of ``merged``, after a last pass over the whole; ``merged`` itself where
    that did not help on what was held out (it diverged, or nothing was to be gained).

    Args:
        record: told of the pass; its ``held_out`` is what ``measure`` gave before.
        own: the parameters, by their names in the checkpoint; ``trained``: the names of those that ``train`` is given,
            which changes them in place.
        measure: the losses and the KL on what was held out.
    """
    began, parameters = time.perf_counter(), {name: p for name, p in own.items() if name in trained}
    start = [p.detach().clone() for p in parameters.values()]
    train(list(parameters.values()))
    for name, p in parameters.items():  # what is measured shall be what is stored
        p.data = p.data.to(plan.source.read(name).dtype).to(p.dtype)
    before, after = record["held_out"]["kl"], measure()
    record["polish"] = {
        "tokens": tokens, "kl_before": before, "kl_after": after["kl"],
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    if not after["kl"] < before:
        for p, value in zip(parameters.values(), start, strict=True):
            p.data.copy_(value)
        record["notes"].append("the last pass end to end did not help on what was held out and was undone")
        return merged
    record["held_out"] |= after
    return {unit.layer.prefix: heads_of(unit, own, merged[unit.layer.prefix]) for unit in plan.units}


def merged_by(
    aligned: Aligned, plan: Plan, unit: Unit, moments: Moments, device: torch.device, notes: list[str]
) -> AttentionWeights:
    """A unit's heads, merged on ``device`` by the moments of what its attention reads, on the CPU; ``notes`` are told
    what had to be done to these."""
    prefix = unit.layer.prefix
    for key, (moment, note) in zip((prefix, (prefix, "memory")), moments.results(), strict=False):
        if note:
            notes.append(f"{prefix.rstrip('.')}: {note}")
        if moment is not None:
            aligned.moments[key] = moment
    weights = to_heads(unit, {name: plan.source.read(name) for name in unit.reads})
    merged = of_main(aligned(weights.on(device)))
    for key in (prefix, (prefix, "memory")):
        aligned.moments.pop(key, None)
    return merged.on("cpu")


def of_main(weights: AttentionWeights) -> AttentionWeights:
    """The main process's weights, so that whatever a GPU rounds otherwise, all go on from the same."""
    known = {f.name: getattr(weights, f.name) for f in fields(weights) if f.name != "layer"}
    tensors = {name: tensor for name, tensor in known.items() if tensor is not None}
    sent: dict[str, Any] = dict(zip(tensors, current().of_main(list(tensors.values())), strict=True))
    return replace(weights, **sent)
