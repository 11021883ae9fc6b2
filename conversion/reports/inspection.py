"""``hf-attn inspect``: heads, KV bytes per token, and what each possible number of KV heads would save."""

from __future__ import annotations

import copy
import html
import os
from dataclasses import replace
from typing import Any

from hf_attn_patch.conversion.checkpoints.hub import resolve
from hf_attn_patch.conversion.checkpoints.reader import Source
from hf_attn_patch.conversion.checkpoints.safetensors_header import DTYPE_BITS
from hf_attn_patch.conversion.checkpoints.sizes import human
from hf_attn_patch.conversion.families.config import write_numbers
from hf_attn_patch.conversion.families.layer import LayerAttention, config_of, of_one_number
from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.conversion.planner import make_plan
from hf_attn_patch.documents.positions import positions_of
from hf_attn_patch.errors import ConversionError
from hf_attn_patch.grouping import KVGrouping, divisors

from .report import cache_itemsize, context_of, html_table, kv_cache_bytes, numbers, stack_rows, table, windowed

#: equal parts of the context for which the cache is sized, to be drawn
STEPS = 64


class Inspection(dict[str, Any]):
    """What ``inspect --json`` prints; as text and in notebooks it is a table."""

    def __str__(self) -> str:
        return inspection_text(self)

    def _repr_html_(self) -> str:
        (stacks, choices), lines = _tables(self), _sentences(self)
        parts = [f"<p>{html.escape(lines[0])}</p>", html_table(*stacks), f"<p>{html.escape(lines[1])}</p>"]
        return "".join([*parts, html_table(*choices), *(f"<p>{html.escape(line)}</p>" for line in lines[2:])])


def inspect_source(source: Source | str | os.PathLike[str], context: int | None = None) -> Inspection:
    """Heads, KV bytes a token, and what each possible number of KV heads would save.

    Args:
        source: a checkpoint folder, a hub id, or a source that was opened already.
        context: tokens for which the whole cache's size is given; None: 8192, or as many as the model can read.

    Raises:
        ConversionError: the checkpoint is broken or of an unknown family.
    """
    if not isinstance(source, Source):
        source = resolve(source)
    plan = make_plan(source, {})
    itemsize = cache_itemsize(plan)
    most = positions_of(plan.text_config)
    beyond = f"the model reads {most} tokens at most, by its config" if context and most and context > most else None
    context = context or context_of(plan)
    now = kv_cache_bytes(plan.layers, itemsize, new=False, tokens=context)
    rows = stack_rows(plan)
    for row in rows:
        row["kv_heads"] = row.pop("kv_heads_before")
        del row["kv_heads_after"]
        widest = max((layer for layer in plan.layers if layer.stack.name == row["attention"]), key=lambda x: x.kv_heads)
        row["kind"] = widest.grouping.kind
    return Inspection(
        {
            "source": source.name,
            "model_type": source.config.get("model_type"),
            "language_model": plan.model_type,
            "attention": rows,
            "tensors": len(source.tensors),
            "bytes": plan.bytes_before,
            "kv_bytes_per_token": now // context,
            "context": context,
            "kv_bytes_at_context": now,
            "choices": [
                choice for n in common_choices(plan) if (choice := _choice(plan, n, itemsize, context)) is not None
            ],
            "warnings": [
                *(w for w in plan.warnings if not w.startswith("every layer already")),
                *filter(None, [windowed(plan.layers, context), beyond]),
            ],
        }
    )


def common_choices(plan: Plan) -> list[int]:
    """Numbers of KV heads that every layer could be merged to."""
    stacks = of_one_number(layer.stack for layer in plan.layers)
    now = [layer.kv_heads for layer in plan.layers if layer.stack in stacks]
    return [n for n in reversed(divisors(min(now))) if all(number % n == 0 for number in now)]


def _choice(plan: Plan, kv_heads: int, itemsize: int, context: int) -> dict[str, Any] | None:
    """What ``--kv-heads kv_heads`` would save; None where the architecture cannot have that number."""
    stacks = of_one_number(layer.stack for layer in plan.layers)
    layers = [
        replace(
            layer,
            new_kv_heads=layer.stack.kv_field.wanted(config_of(layer.stack, plan.text_config), kv_heads, layer.index),
        )
        if layer.stack in stacks
        else layer
        for layer in plan.layers
    ]
    for stack in stacks:
        own = [layer for layer in layers if layer.stack is stack]
        raw = copy.deepcopy(plan.source.config)
        try:
            write_numbers(stack, raw, plan.text_config, own)
        except ConversionError:
            return None
    now, after = (kv_cache_bytes(layers, itemsize, new=new, tokens=context) for new in (False, True))
    return {
        "kv_heads": kv_heads,
        "kind": KVGrouping(next(layer.heads for layer in layers if layer.stack in stacks), kv_heads).kind,
        "kv_bytes_per_token": after // context,
        "kv_bytes_at_context": after,
        "kv_bytes_over_context": [
            kv_cache_bytes(layers, itemsize, new=True, tokens=context * i // STEPS) for i in range(STEPS + 1)
        ],
        "kv_share": after / now if now else 1.0,
        "weight_bytes_saved": sum(_weights_saved(plan.source, layer) for layer in layers),
    }


def _weights_saved(source: Source, layer: LayerAttention) -> int:
    saved = 0
    for projection in layer.stack.projections:
        if layer.name(projection.module) not in source.tensors:
            continue  # values that are the keys
        dtype = source.tensors[layer.name(projection.module)].dtype
        rows = layer.rows(projection, layer.kv_heads) - layer.rows(projection, layer.new_kv_heads)
        columns = layer.inputs(projection) + (layer.name(projection.module, "bias") in source.tensors)
        saved += rows * columns * DTYPE_BITS[dtype] // 8
    return saved


Table = tuple[tuple[str, ...], list[tuple[object, ...]]]


def _tables(facts: dict[str, Any]) -> tuple[Table, Table]:
    """(header, rows) of the attentions, and of the numbers of KV heads to choose from."""
    context = facts["context"]
    stacks: list[tuple[object, ...]] = [
        (r["attention"], r["layers"], numbers(r["heads"]), numbers(r["kv_heads"]), numbers(r["head_dim"]), r["kind"])
        for r in facts["attention"]
    ]
    choices: list[tuple[object, ...]] = [
        (
            c["kv_heads"],
            c["kind"],
            human(c["kv_bytes_per_token"]),
            human(c["kv_bytes_at_context"]),
            f"{c['kv_share']:.1%}",
            human(c["weight_bytes_saved"]),
        )
        for c in facts["choices"]
    ]
    return (
        (("attention", "layers", "heads", "KV heads", "head dim", "kind"), stacks),
        (("KV heads", "kind", "per token", f"at {context}", "of now", "weights saved"), choices),
    )


def _sentences(facts: dict[str, Any]) -> list[str]:
    """Before the first table, before the second, and after it."""
    language, context = facts["language_model"], facts["context"]
    inner = "" if language == facts["model_type"] else f", language model {language}"
    return [
        f"{facts['source']}: {facts['model_type']}{inner}, {facts['tensors']} tensors, {human(facts['bytes'])}",
        f"KV cache: {human(facts['kv_bytes_per_token'])} per token, "
        f"{human(facts['kv_bytes_at_context'])} at {context} tokens",
        *(f"note: {warning}" for warning in facts["warnings"]),
    ]


def inspection_text(facts: dict[str, Any]) -> str:
    """``inspect`` for people."""
    (stacks, choices), (title, cache, *notes) = _tables(facts), _sentences(facts)
    return "\n".join([title, "", table(*stacks), "", cache, "", table(*choices), *notes])
