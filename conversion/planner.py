"""Plan first: from config and headers to what will be read, changed and written. No weights are touched."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_attn_patch.errors import ConversionError
from hf_attn_patch.hf.auto_classes import PREFIX

from .checkpoints.dtypes import FLOATS
from .checkpoints.reader import Source
from .checkpoints.shards import same_shards, split_shards
from .families.accounts import refuse_unaccounted
from .families.config import LanguageModel, answers, architectures, grouped_parts, part_of, read_config, speaks
from .families.drafting import drafting_of, without_drafting
from .families.layer import LayerAttention, norm_tensors
from .families.table import Norm, Projection
from .methods.registry import method_named
from .plan_data import KVHeads, NewTensor, Plan, Unit
from .reports.report import ReadablePlan
from .targets import of_caches, with_targets


def make_plan(
    source: Source,
    kv_heads: KVHeads,
    *,
    method: str | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    max_shard_size: int | None = None,
    with_code: bool = False,
) -> Plan:
    """Check everything that can be known without reading weights.

    Args:
        source: an opened checkpoint.
        kv_heads: one number for all layers; a list with one per layer; or ``{stack: number or list}`` for models
            with several attentions, of which those not named stay as they are. One number for all leaves out the
            encoder beside a decoder, which has no cache.
        max_shard_size: bytes of an output file at most (one tensor may be larger); None: shards as in the source.
        with_code: let the result carry its model class's code, for ``trust_remote_code`` without this package.

    Raises:
        ConversionError: the conversion cannot be done.
    """
    model = read_config(source.config, str(source.folder / "config.json"))
    chosen = method_named(method, options or {}, speaks=_makes_samples(source, model))
    model.locate(source.tensors)
    layers = with_targets(model, kv_heads := of_caches(model, kv_heads))
    new_config = copy.deepcopy(source.config)
    model.write_kv_heads(new_config, layers)
    if with_code:
        _add_code(new_config)
    for layer in layers:
        _check_layer(source, layer)
    drafting = drafting_of(source.config, source.tensors, model, source.name)
    if chosen.scope == "layer":
        refuse_unaccounted({name: t.shape for name, t in source.tensors.items()}, layers, chosen.name)
    plan = ReadablePlan(
        source, model.family, model.model_type, model.config, model.text_config, new_config, tuple(layers), chosen,
        chosen.resolve(options or {}), seed, kv_heads, warnings=tuple(model.warnings), with_code=with_code,
    )  # fmt: skip
    if _tokenizer_has_code(source):
        plan.warnings += (
            "the tokenizer has code of its own (auto_map in tokenizer_config.json), which does not come along: copy "
            "its .py files into the result, or load the tokenizer from the source",
        )
    plan.warnings += _left_out(model, layers) + _clipped(plan)
    changes = any(layer.changes for layer in layers)
    if drafting and changes:
        without_drafting(part_of(new_config, model.path), model.text_config)
        plan.warnings += (
            f"{len(drafting)} tensors of layers that draft further tokens ({min(drafting)}, ...) are left out, because "
            "their heads would not fit the result's config: speculative decoding by them is for the source alone",
        )
    if not changes:
        plan.warnings += ("every layer already has that many KV heads: the weights will be copied as they are",)
    _plan_tensors(plan, drafting if changes else set())
    pieces = {name: tensor.nbytes for name, tensor in plan.tensors.items()}
    plan.shards = same_shards(source, pieces) if max_shard_size is None else split_shards(pieces, max_shard_size)
    return plan


def _makes_samples(source: Source, model: LanguageModel) -> bool:
    """Whether the source can write calibration samples by itself."""
    raw, config, text = source.config, model.config, model.text_config
    return speaks(raw, model.family, config, text) or answers(raw, config, text)


def _tokenizer_has_code(source: Source) -> bool:
    path = source.folder / "tokenizer_config.json"
    if path.name not in source.companions:
        return False
    try:
        return "auto_map" in json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, RecursionError):
        return False  # not what decides a conversion; loading the tokenizer will tell


def _add_code(config: dict[str, Any]) -> None:
    """Say in a result's config.json where its code is."""
    model_type = str(config.get("model_type"))
    inside = grouped_parts(config)
    if not model_type.startswith(PREFIX) and inside:
        raise ConversionError(
            f"--with-code cannot help here: the language model inside this {model_type} becomes {inside[0]}, and "
            f"transformers' own {model_type} asks no code of a checkpoint for its parts. Where the result is loaded, "
            "hf_attn_patch must be installed and imported; leave the option out"
        )
    if not model_type.startswith(PREFIX):
        raise ConversionError(
            f"--with-code is for models that need code of hf_attn_patch; the result is a plain {model_type}, which "
            "transformers loads by itself: leave the option out"
        )
    from hf_attn_patch.modeling.remote_code import auto_map

    names = architectures(config)
    config["auto_map"] = auto_map(model_type, names[0] if names else None)


def _left_out(model: LanguageModel, layers: Sequence[LayerAttention]) -> tuple[str, ...]:
    """What to say of attentions without a cache that stay as they are while others change."""
    if not any(layer.changes and layer.stack.cached for layer in layers):
        return ()
    return tuple(
        f"the {stack.name}'s attention keeps its {layers_[0].kv_heads} KV heads: nothing of it is kept from one step to"
        f" the next, so fewer would save no cache; --kv-heads {stack.name}=N,... merges them too"
        for stack, layers_ in model.stacks
        if not stack.cached
        and not any(layer.changes for layer in layers if layer.stack is stack)
        and layers_[0].kv_heads > 1
    )


def _clipped(plan: Plan) -> tuple[str, ...]:
    """What to say where projections are clipped, which is not the same in another basis (OLMo, DBRX)."""
    config = getattr(plan.text_config, "attn_config", None) or plan.text_config
    limit = getattr(config, "clip_qkv", None)
    if limit is None or plan.method.scope != "layer" or not any(layer.changes for layer in plan.layers):
        return ()
    return (
        f"the model clips queries, keys and values at {limit:g}: heads that are turned into one basis are clipped "
        "elsewhere, so the merge is as good as it says only where little is clipped; --method mean turns nothing",
    )


def _expect(source: Source, name: str, shape: tuple[int, ...], why: str) -> None:
    """A tensor that must be there, float, in this shape."""
    tensor = source.tensors.get(name)
    if tensor is None:
        module = name.rpartition(".")[0]
        if f"{module}.base_layer.weight" in source.tensors:
            raise ConversionError(f"{module} carries a PEFT adapter: save the model after merge_and_unload()")
        if any(other.startswith(module + ".") for other in source.tensors if other != f"{module}.bias"):
            raise ConversionError(f"{module} is quantized (it has no plain weight); convert the unquantized checkpoint")
        raise ConversionError(f"tensor {name!r} is missing from {source.name}, though config.json asks for it")
    if tensor.shape != shape:
        raise ConversionError(
            f"tensor {name!r} has shape {list(tensor.shape)}, but config.json ({why}) asks for {list(shape)}"
        )
    if tensor.dtype not in FLOATS:
        raise ConversionError(
            f"tensor {name!r} has dtype {tensor.dtype}: a quantized checkpoint cannot be converted; "
            "use the unquantized one"
        )


def projection_shape(layer: LayerAttention, projection: Projection, kv_heads: int) -> tuple[int, int]:
    """The weight's shape with that many KV heads."""
    rows, columns = layer.rows(projection, kv_heads), layer.inputs(projection)
    return (columns, rows) if projection.transposed else (rows, columns)


def has_norm(source: Source, layer: LayerAttention, norm: Norm) -> bool:
    """Whether this checkpoint uses the norm at all (cohere, stablelm: an option of the config)."""
    names = norm_tensors(layer, norm, layer.kv_heads)
    if norm.or_shared and any(
        name in source.tensors and source.tensors[name].shape == (layer.head_dim,) for name in names
    ):
        return False
    return any(name in source.tensors for name in names)


def _check_layer(source: Source, layer: LayerAttention) -> None:
    """Every attention tensor of a layer against the config's numbers."""
    why = f"{layer.heads} heads, {layer.kv_heads} KV heads of {layer.head_dim}, width {layer.width}"
    for projection in layer.stack.projections:
        if projection.optional and layer.name(projection.module) not in source.tensors:
            continue
        _expect(source, layer.name(projection.module), projection_shape(layer, projection, layer.kv_heads), why)
        bias = layer.name(projection.module, "bias")
        if bias in source.tensors:
            _expect(source, bias, (layer.rows(projection, layer.kv_heads),), why)
    rows, columns = layer.width, layer.heads * layer.value_dim
    shape = (columns, rows) if layer.stack.output_transposed else (rows, columns)
    _expect(source, layer.name(layer.stack.output), shape, why)
    if layer.name(layer.stack.output, "bias") in source.tensors:
        _expect(source, layer.name(layer.stack.output, "bias"), (layer.width,), why)
    for norm in layer.stack.norms:
        if has_norm(source, layer, norm):
            for name, shape_ in norm_tensors(layer, norm, layer.kv_heads).items():
                _expect(source, name, shape_, why)
    if layer.stack.sinks and layer.prefix + layer.stack.sinks in source.tensors:
        _expect(source, layer.prefix + layer.stack.sinks, (layer.heads,), why)


def _plan_tensors(plan: Plan, left_out: set[str]) -> None:
    """Fill in ``plan.units`` and ``plan.tensors`` (in the order of the source's files)."""
    source = plan.source
    units: list[Unit] = []
    written: dict[str, NewTensor] = {}
    dropped = set(left_out)
    for layer in plan.layers:
        if not layer.changes:
            continue
        for unit in _units_of(layer, source, plan.method.scope):
            reads, writes = _reads(source, unit), _writes(source, unit)
            units.append(replace(unit, reads=tuple(reads), writes=tuple(writes)))
            for name, shape in writes.items():
                written[name] = NewTensor(source.tensors[name].dtype, shape, len(units) - 1)
            dropped.update(set(reads) - set(writes))
    plan.units = tuple(units)
    plan.tensors = {
        name: written.get(name) or NewTensor(tensor.dtype, tensor.shape)
        for name, tensor in source.tensors.items()
        if name not in dropped
    }


def _units_of(layer: LayerAttention, source: Source, scope: str) -> list[Unit]:
    norms = tuple(norm for norm in layer.stack.norms if has_norm(source, layer, norm))
    projections = tuple(p for p in layer.stack.projections if not p.optional or layer.name(p.module) in source.tensors)
    if scope == "layer":
        return [Unit(layer, projections, norms, output=True)]
    alone = [Unit(layer, (p,)) for p in projections if "k" in p.holds or "v" in p.holds]
    return alone + [Unit(layer, (), (norm,)) for norm in norms if norm.of == "k"]


def _reads(source: Source, unit: Unit) -> list[str]:
    layer = unit.layer
    modules = [p.module for p in unit.projections] + ([layer.stack.output] if unit.output else [])
    names = [layer.name(module, what) for module in modules for what in ("weight", "bias")]
    names = [name for name in names if name in source.tensors]
    for norm in unit.norms:
        names += norm_tensors(layer, norm, layer.kv_heads)
    sinks = layer.prefix + (layer.stack.sinks or "")
    return [*names, sinks] if unit.output and layer.stack.sinks and sinks in source.tensors else names


def _writes(source: Source, unit: Unit) -> dict[str, tuple[int, ...]]:
    layer = unit.layer
    out: dict[str, tuple[int, ...]] = {}
    for projection in layer.stack.written or layer.stack.projections:
        if projection.module not in [p.module for p in unit.projections]:
            continue
        out[layer.name(projection.module)] = projection_shape(layer, projection, layer.new_kv_heads)
        if layer.name(projection.module, "bias") in source.tensors:
            out[layer.name(projection.module, "bias")] = (layer.rows(projection, layer.new_kv_heads),)
    for norm in unit.norms:
        out.update(norm_tensors(layer, norm, layer.new_kv_heads))
    for name in _reads(source, unit) if unit.output else ():
        if name not in out and not name.startswith(tuple(layer.prefix + norm.module for norm in layer.stack.norms)):
            out[name] = source.tensors[name].shape
    return out
