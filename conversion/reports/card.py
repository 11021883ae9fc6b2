"""The model card (README.md) of a converted checkpoint, by huggingface_hub's ModelCard."""

from __future__ import annotations

from typing import Any

from hf_attn_patch.conversion.checkpoints.sizes import human
from hf_attn_patch.conversion.families.config import grouped_parts
from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.hf.auto_classes import PREFIX

from .report import kv_bytes_per_token, numbers

_TEXT = """\
---
{metadata}
---

# {title}

{base}, {done}.
{loading}
| attention | layers | query heads | KV heads before | KV heads now |
|---|---|---|---|---|
{rows}

- {how}
- KV cache per token: {before} before, {after} now.
- Everything that is not attention is the source's, byte for byte. `conversion.json` records versions, source hashes
  and the command; `hf-attn verify SOURCE THIS` {check}.

{caution}
{command}"""

#: of methods that look at the weights alone, and of those that read text
_UNTRAINED = """\
The merged heads have not been trained together. Mean-pooling in particular changes what the model says until it is
uptrained (Ainslie et al. 2023, [arXiv 2305.13245](https://arxiv.org/abs/2305.13245))."""
_DONE = "converted with [hf-attn-patch](https://pypi.org/project/hf-attn-patch/)"
_NOTHING = "No heads were merged: every layer has as many as it had."
_CALIBRATED = """\
Heads were merged by what the layers read on a calibration text{fitted}. See with `hf-attn evaluate` what was lost."""


def model_card(plan: Plan, record: dict[str, Any]) -> str:
    """The card's text: metadata from the source's own card where it has one, what was done, and how to check it."""
    from huggingface_hub import ModelCard, ModelCardData

    source = plan.source
    inherited = _source_metadata(source.folder)
    is_hub = source.revision is not None
    data = ModelCardData(
        license=inherited.get("license"),
        language=inherited.get("language"),
        library_name="transformers",
        pipeline_tag=inherited.get("pipeline_tag"),
        base_model=source.name if is_hub else None,
        tags=["gqa", "hf-attn-patch"],
    )
    rows = []
    for r in record["attention"]:
        kv = f"{numbers(r['kv_heads_before'])} | {numbers(r['kv_heads_after'])}"
        rows.append(f"| {r['attention']} | {r['layers']} | {r['heads']} | {kv} |")
    given = ", ".join(f"{k}={v}" for k, v in plan.options.items() if v is not None)
    with_options = f" with {given}" if given else ""
    how = f"Method `{plan.method.name}`: {plan.method.summary}{with_options}; seed {plan.seed}."
    name = source.name.rsplit("/", 1)[-1] if is_hub else source.folder.resolve().name
    text = _TEXT.format(
        metadata=data.to_yaml(),
        title=f"{name} with fewer KV heads" if plan.units else name,
        base=f"[{source.name}](https://huggingface.co/{source.name})" if is_hub else f"`{name}`",
        done=_DONE + " to fewer KV heads" * bool(plan.units),
        loading=_loading(plan),
        rows="\n".join(rows),
        how=how if plan.units else _NOTHING,
        before=human(kv_bytes_per_token(plan, new=False)),
        after=human(kv_bytes_per_token(plan, new=True)),
        check="recomputes and compares" if plan.method.exact else "checks what does not depend on the calibration text",
        caution=_caution(plan, record["details"] or {}) if plan.units else "",
        command=f"\n```\n{record['command']}\n```\n" if record["command"] else "",
    )
    return str(ModelCard(text))


def _caution(plan: Plan, details: dict[str, Any]) -> str:
    """What was done to the heads, and what is to be expected of them."""
    if plan.method.exact or "random inputs" in " ".join(details.get("notes", ())):  # where no sample could be made
        return _UNTRAINED
    fitted = ", and layers were fitted to the source's on it" if details.get("refit") else ""
    if "polish" in details:
        fitted += f"; all attentions were then trained together on {details['polish']['tokens']:,} tokens of it"
    return _CALIBRATED.format(fitted=fitted)


def _loading(plan: Plan) -> str:
    """How to load a model whose class transformers does not have."""
    model_type = plan.new_config.get("model_type", "")
    if not model_type.startswith(PREFIX):
        inner = grouped_parts(plan.new_config)
        return f"\nIts language model is a `{inner[0]}`: `import hf_attn_patch` before loading it.\n" if inner else ""
    code = " or, without that package, with `trust_remote_code=True`" if plan.with_code else ""
    return f"\n`{model_type}` loads with transformers' Auto classes after `import hf_attn_patch`{code}.\n"


def _source_metadata(folder: Any) -> dict[str, Any]:
    """What is taken over from the metadata block of the source's README.md; nothing where it cannot be read."""
    import yaml
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        found = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OSError):
        return {}  # not ours to repair, and a conversion needs none of it
    return {key: value for key, value in found.items() if isinstance(value, str) or _is_texts(value)}


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
