"""One unit of work: read a layer's tensors, let the method merge their heads, give back tensors to write."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.conversion.checkpoints.dtypes import has_nonfinite, torch_dtype
from hf_attn_patch.conversion.families.head_layouts import AttentionWeights, join, split
from hf_attn_patch.conversion.families.layer import norm_tensors
from hf_attn_patch.conversion.plan_data import Plan, Unit
from hf_attn_patch.errors import ConversionError

from .method import Merge


def compute_unit(
    plan: Plan, unit: Unit, merge: Merge, *, allow_nonfinite: bool = False, digests: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """The tensors that ``unit`` writes, by name, contiguous and in the checkpoint's dtypes.

    Args:
        digests: if given, takes the sha256 of every tensor read.

    Raises:
        ConversionError: NaN or Inf was read or came out, or the method changed what it must not.
    """
    read: dict[str, Tensor] = {}
    for name in unit.reads:
        tensor = plan.source.read(name).contiguous()
        raw = raw_bytes(tensor)
        if not allow_nonfinite:
            refuse_nonfinite(raw, plan.source.tensors[name].dtype, name)
        if digests is not None:
            digests[name] = hashlib.sha256(raw).hexdigest()
        read[name] = tensor
    before = to_heads(unit, read)
    try:
        after = merge(before)
    except torch.linalg.LinAlgError:
        raise ConversionError(
            f"method {plan.method.name} cannot factor {unit.reads[0]!r} and its like, which hold NaN, Inf or numbers "
            "too large; --method mean only averages them"
        ) from None
    _check_shapes(before, after)
    out = {}
    for name, tensor in from_heads(unit, after).items():
        stored = tensor.to(torch_dtype(plan.tensors[name].dtype)).contiguous()
        if tuple(stored.shape) != plan.tensors[name].shape:
            raise AssertionError(f"{name}: {tuple(stored.shape)} instead of {plan.tensors[name].shape}")
        if not allow_nonfinite:
            refuse_nonfinite(raw_bytes(stored), plan.tensors[name].dtype, name, "would become")
        out[name] = stored
    return {name: out[name] for name in unit.writes}


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def refuse_nonfinite(raw: Any, dtype: str, name: str, verb: str = "has") -> None:
    """Raise for NaN or Inf among the floats of ``raw``."""
    if has_nonfinite(raw, dtype):
        raise ConversionError(
            f"tensor {name!r} {verb} NaN or Inf values; pass --allow-nonfinite to convert it all the same"
        )


def to_heads(unit: Unit, tensors: dict[str, Tensor]) -> AttentionWeights:
    """The unit's tensors by heads, in fp32 (fp64 if the checkpoint is)."""
    layer, stack = unit.layer, unit.layer.stack

    def load(name: str) -> Tensor | None:
        tensor = tensors.get(name)
        return None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    weights = AttentionWeights(layer)
    for projection in unit.projections:
        for what, suffix in (("weight", ""), ("bias", "_bias")):
            tensor = load(layer.name(projection.module, what))
            if tensor is None:
                continue
            if projection.transposed and what == "weight":
                tensor = tensor.T
            parts = split(projection, tensor, layer.heads, layer.kv_heads, layer.head_dim, layer.value_dim)
            for role, part in parts.items():
                setattr(weights, role + suffix, part)
    for norm in unit.norms:
        gains = [load(name) for name in norm_tensors(layer, norm, layer.kv_heads)]
        count = layer.count(norm, layer.kv_heads)
        setattr(weights, f"{norm.of}_norm", torch.cat([g.reshape(-1) for g in gains if g is not None]).view(count, -1))
    if unit.output:
        o = load(layer.name(stack.output))
        if o is None:
            raise AssertionError("a layer unit without its output projection")
        o = o.T if stack.output_transposed else o
        weights.o = o.reshape(layer.width, layer.heads, layer.value_dim).transpose(0, 1)
        weights.o_bias = load(layer.name(stack.output, "bias"))
        weights.sinks = load(layer.prefix + stack.sinks) if stack.sinks else None
    return weights


def from_heads(unit: Unit, weights: AttentionWeights) -> dict[str, Tensor]:
    """The inverse of :func:`to_heads`, with the new numbers of heads."""
    layer, stack = unit.layer, unit.layer.stack
    out: dict[str, Tensor] = {}
    mine = [projection.module for projection in unit.projections]
    for projection in stack.written or stack.projections:
        if projection.module not in mine:
            continue
        for what, suffix in (("weight", ""), ("bias", "_bias")):
            parts = {role: getattr(weights, role + suffix) for role in projection.holds}
            if any(part is None for part in parts.values()):
                continue
            tensor = join(projection, parts)
            out[layer.name(projection.module, what)] = (
                tensor.T if projection.transposed and what == "weight" else tensor
            )
    for norm in unit.norms:
        gains: Tensor = getattr(weights, f"{norm.of}_norm")
        shapes = norm_tensors(layer, norm, layer.new_kv_heads)
        if norm.form == "list":
            out.update(zip(shapes, gains, strict=True))
        else:
            ((name, shape),) = shapes.items()
            out[name] = gains.reshape(shape)
    if unit.output and weights.o is not None:
        o = weights.o.transpose(0, 1).reshape(layer.width, -1)
        out[layer.name(stack.output)] = o.T if stack.output_transposed else o
        if weights.o_bias is not None:
            out[layer.name(stack.output, "bias")] = weights.o_bias
        if weights.sinks is not None and stack.sinks:
            out[layer.prefix + stack.sinks] = weights.sinks
    return out


def _check_shapes(before: AttentionWeights, after: AttentionWeights) -> None:
    """A method gives back what it got; only k's and v's first dimension may change."""
    for name in (f.name for f in fields(AttentionWeights) if f.name != "layer"):
        old, new = getattr(before, name), getattr(after, name)
        if (old is None) != (new is None):
            raise AssertionError(f"the method added or lost {name} of {before.layer.prefix}")
        if old is None:
            continue
        heads = before.layer.new_kv_heads if name.startswith(("k", "v")) else old.shape[0]
        if tuple(new.shape) != (heads, *old.shape[1:]):
            raise AssertionError(f"the method gave {name} of {before.layer.prefix} the shape {tuple(new.shape)}")
