"""The model card of an uptrained model: what it was, what was done, what came of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from hf_attn_patch.training.options import UptrainOptions

from .checkpoints import Progress
from .held_out import trained_value

#: what a conversion leaves beside the weights: the uptrained model carries it on
CONVERSION = "conversion.json"


def write_card(folder: Path, *, options: UptrainOptions, progress: Progress, config: Any, kind: str = "causal") -> None:
    """``README.md`` of the model in ``folder``; the source's conversion record is copied beside it."""
    record = Path(options.model, CONVERSION)
    conversion = None
    if record.is_file():
        conversion = json.loads(record.read_text(encoding="utf-8"))
        shutil.copy(record, folder)
    (folder / "README.md").write_text(render_card(options, progress, config, conversion, kind), encoding="utf-8")


def render_card(
    options: UptrainOptions,
    progress: Progress,
    config: Any,
    conversion: dict[str, Any] | None = None,
    kind: str = "causal",
) -> str:
    """The card as Markdown with the hub's front matter."""
    ce, kl = options.loss_weights
    heads = config.get_text_config(decoder=True)
    kv_heads = getattr(heads, "num_key_value_heads", None)
    loss = " + ".join(f"{w:g} x {name}" for w, name in ((ce, "cross-entropy"), (kl, "KL to the teacher")) if w)
    if kind == "encoder":
        loss = "distance of the teacher's embeddings, of tokens (relative, squared) and of texts (cosine)"
    size = options.tokens_per_step if kind == "causal" else 1
    fitted = min(progress.tokens, -(-options.layerwise_tokens // size) * size)
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {options.model}",
        "tags: [hf-attn-patch, gqa, uptrained]",
        "---",
        "",
        f"# {Path(options.output).name}",
        "",
        f"`{options.model}` uptrained on {progress.tokens:,} tokens of `{options.dataset}`.",
        "",
        "| | |",
        "|---|---|",
        f"| query heads | {getattr(heads, 'num_attention_heads', 'n/a')} |",
        f"| KV heads | {kv_heads if kv_heads is not None else 'as the base model'} |",
        *([f"| converted from | {describe_conversion(conversion)} |"] if conversion else []),
        f"| teacher | {f'`{options.teacher}`' if options.teacher else 'none'} |",
        f"| loss | {loss} |",
        *([f"| before that | attention fitted layer by layer on the first {fitted:,} tokens |"] if fitted else []),
        f"| trained | {options.mode} |",
        f"| peak learning rate, schedule | {options.lr:g}, {options.decay} after {options.warmup:.0%} warm-up |",
        f"| sequence length, batch | {options.sequence_length}, {options.batch_size} |",
        f"| seed | {options.seed} |",
    ]
    if progress.history:
        first, last = progress.history[0], progress.history[-1]
        best = min(progress.history, key=lambda entry: trained_value(entry, ce, kl))
        columns = [key for key in first if key not in ("step", "tokens", "scored")]
        lines += [
            "",
            f"Held-out text ({int(first['scored']):,} tokens; means per token, logarithms natural):",
            "",
            f"| | tokens | {' | '.join(columns)} |",
            "|---" * (2 + len(columns)) + "|",
        ]
        for name, entry in (("before", first), ("after", last), ("best", best)):
            numbers = " | ".join(f"{entry[key]:.4f}" if entry[key] < 1e6 else f"{entry[key]:.2e}" for key in columns)
            lines.append(f"| {name} | {entry['tokens']:,} | {numbers} |")
    return "\n".join([*lines, ""])


def describe_conversion(record: dict[str, Any]) -> str:
    """One line on what a conversion record says.

    >>> describe_conversion({"source": {"name": "m"}, "method": "mean",
    ...                      "attention": [{"attention": "self", "kv_heads_before": 8, "kv_heads_after": 2}]})
    '`m`, method mean, self-attention 8 -> 2 KV heads'
    """
    parts = [f"`{record['source']['name']}`, method {record['method']}"]
    parts += [
        f"{a['attention']}-attention {a['kv_heads_before']} -> {a['kv_heads_after']} KV heads"
        for a in record.get("attention", [])
    ]
    return ", ".join(parts)
