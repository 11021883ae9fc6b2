"""What a plan says to people and programs: heads, bytes, KV bytes per token, disk and memory."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from hf_attn_patch.conversion.calibration.memory import memory_needed
from hf_attn_patch.conversion.checkpoints.safetensors_header import DTYPE_BITS
from hf_attn_patch.conversion.checkpoints.sizes import human
from hf_attn_patch.conversion.families.kv_field import format_numbers
from hf_attn_patch.conversion.families.layer import LayerAttention
from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.documents.positions import positions_of

#: tokens for which a cache is sized where nobody says, of models that can read so many
CONTEXT = 8192


def context_of(plan: Plan) -> int:
    """Tokens for which a model's cache is sized where nobody says."""
    return min(CONTEXT, positions_of(plan.text_config) or CONTEXT)


def kv_cache_bytes(layers: Iterable[LayerAttention], itemsize: float, *, new: bool, tokens: int) -> int:
    """Bytes of the KV cache after so many tokens: HKV * (D + Dv) * itemsize * kept, summed over layers.

    A layer with a sliding window or chunks keeps no more than that; one that reads another's cache keeps nothing.
    Cross-attention's cache grows with the encoder's input, one entry for each of its tokens (as many as the decoder's
    here; Whisper's encoder always gives the same number), and counts too. An encoder's own attention caches nothing.
    """
    total = 0.0
    for layer in layers:
        if not layer.caches:
            continue
        heads = layer.new_kv_heads if new else layer.kv_heads
        heads = layer.heads if layer.stack.caches_query_heads else heads
        total += heads * (layer.head_dim + layer.value_dim) * itemsize * layer.kept(tokens)
    return int(total)


def kv_bytes_per_token(plan: Plan, *, new: bool) -> int:
    """:func:`kv_cache_bytes` after :func:`context_of` tokens, for each of them."""
    tokens = context_of(plan)
    return kv_cache_bytes(plan.layers, cache_itemsize(plan), new=new, tokens=tokens) // tokens


def windowed(layers: Sequence[LayerAttention], tokens: int) -> str | None:
    """What to say of layers that do not keep every token; None if all do."""
    cached = [layer for layer in layers if layer.caches]
    short = [layer for layer in cached if layer.kept(tokens) < tokens]
    if not short:
        return None
    own = sorted({layer.kept(tokens) for layer in short} - {0})
    parts = [f"{sum(layer.kept(tokens) == n for layer in short)} of {len(cached)} layers keep {n} tokens" for n in own]
    if shared := sum(layer.kept(tokens) == 0 for layer in short):
        parts.append(f"{shared} read another layer's cache")
    return f"of {tokens} tokens " + " and ".join(parts)


def cache_itemsize(plan: Plan) -> int:
    """Bytes of one cached number: that of the checkpoint's K projection."""
    layer = plan.layers[0]
    for projection in layer.stack.projections:
        if "k" in projection.holds:
            return DTYPE_BITS[plan.source.tensors[layer.name(projection.module)].dtype] // 8
    raise AssertionError("a stack without keys")


def stack_rows(plan: Plan) -> list[dict[str, Any]]:
    """For each attention of the model: its layers and heads before and after."""
    rows = []
    for stack in dict.fromkeys(layer.stack for layer in plan.layers):
        layers = [layer for layer in plan.layers if layer.stack is stack]
        before, after = [x.kv_heads for x in layers], [x.new_kv_heads for x in layers]
        rows.append(
            {
                "attention": stack.name,
                "layers": len(layers),
                "heads": one_or_all([layer.heads for layer in layers]),
                "head_dim": one_or_all([layer.head_dim for layer in layers]),
                "kv_heads_before": one_or_all(before),
                "kv_heads_after": one_or_all(after),
            }
        )
    return rows


def one_or_all(values: list[int]) -> int | list[int]:
    """The one number that all layers have, or all of them."""
    return values[0] if len(set(values)) == 1 else values


def plan_dict(plan: Plan, workers: int = 1) -> dict[str, Any]:
    """``--dry-run --json``."""
    changed = [name for name, tensor in plan.tensors.items() if tensor.unit is not None]
    return {
        "source": plan.source.name,
        "model_type": plan.source.config.get("model_type"),
        "language_model": plan.model_type,
        "result_model_type": plan.new_config.get("model_type"),
        "method": plan.method.name,
        "options": plan.options,
        "seed": plan.seed,
        "attention": stack_rows(plan),
        "tensors": {
            "before": len(plan.source.tensors),
            "after": len(plan.tensors),
            "changed": len(changed),
            "copied": len(plan.tensors) - len(changed),
        },
        "bytes": {"before": plan.bytes_before, "after": plan.bytes_after},
        "context": context_of(plan),
        "kv_bytes_per_token": {
            "before": kv_bytes_per_token(plan, new=False),
            "after": kv_bytes_per_token(plan, new=True),
        },
        "output_files": [shard.name for shard in plan.shards],
        "disk_needed": plan.disk_needed,
        "memory_needed": memory_needed(plan, workers),
        "warnings": [*plan.warnings, *filter(None, [windowed(plan.layers, context_of(plan))])],
    }


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns under a header, numbers to the right."""
    texts = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(header))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in texts
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """:func:`table` for notebooks."""
    lines = [("th", header), *(("td", row) for row in rows)]
    return (
        "<table>"
        + "".join(
            "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>" for tag, row in lines
        )
        + "</table>"
    )


def numbers(value: int | list[int]) -> str:
    """One number of heads or a list of them."""
    return str(value) if isinstance(value, int) else format_numbers(value)


ATTENTION = ("attention", "layers", "heads", "head dim", "KV heads", "after")


def attention_rows(facts: dict[str, Any]) -> list[tuple[object, ...]]:
    """Under :data:`ATTENTION`, of :func:`plan_dict`."""
    return [
        (
            r["attention"],
            r["layers"],
            numbers(r["heads"]),
            numbers(r["head_dim"]),
            numbers(r["kv_heads_before"]),
            numbers(r["kv_heads_after"]),
        )
        for r in facts["attention"]
    ]


def plan_lines(plan: Plan, facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, how much) below the table of heads."""
    kv, size, tensors = facts["kv_bytes_per_token"], facts["bytes"], facts["tensors"]
    return [
        ("method", f"{plan.method.name}: {plan.method.summary}"),
        ("KV cache", _cache_line(kv)),
        (
            "tensors",
            f"{tensors['before']} -> {tensors['after']}: {tensors['changed']} changed, {tensors['copied']} copied",
        ),
        ("weights", f"{human(size['before'])} -> {human(size['after'])} in {len(plan.shards)} file(s)"),
        ("disk needed", human(facts["disk_needed"])),
        ("memory needed", f"{human(facts['memory_needed'])} beside the programs themselves"),
        *(("note", warning) for warning in facts["warnings"]),
    ]


def _cache_line(kv: dict[str, int]) -> str:
    if not kv["before"]:
        return "none: an encoder keeps no keys and values"
    return f"{human(kv['before'])} -> {human(kv['after'])} per token ({kv['after'] / kv['before']:.1%})"


def plan_title(facts: dict[str, Any]) -> str:
    """The source, and what its family becomes."""
    before, after = facts["model_type"], facts["result_model_type"]
    return f"{facts['source']}: {before}" + (f" -> {after}" if after != before else "")


def plan_text(plan: Plan, workers: int = 1) -> str:
    """``--dry-run`` for people."""
    facts = plan_dict(plan, workers)
    lines = [plan_title(facts), "", table(ATTENTION, attention_rows(facts)), ""]
    return "\n".join(lines + [f"{what:<17} {how}" for what, how in plan_lines(plan, facts)])


def plan_html(plan: Plan) -> str:
    """A plan in a notebook."""
    facts = plan_dict(plan)
    return (
        f"<p>{html.escape(plan_title(facts))}</p>{html_table(ATTENTION, attention_rows(facts))}"
        f"{html_table(('', ''), plan_lines(plan, facts))}"
    )


class ReadablePlan(Plan):
    """A plan that says what it will do: as text, and as HTML in a notebook."""

    def __str__(self) -> str:
        """What ``--dry-run`` prints."""
        return plan_text(self)

    def _repr_html_(self) -> str:
        return plan_html(self)
