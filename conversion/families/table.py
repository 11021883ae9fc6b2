"""Where each model family keeps Q, K, V and O, and the numbers of heads: data, read by everything in this package.

To add a family, add a :class:`Family` to :data:`FAMILIES` (or call :func:`register`). Names of tensors are made of
``prefix + stack.layer.format(i=layer) + module + ".weight"`` or ``".bias"``.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from hf_attn_patch.errors import ConversionError

from .decoder_rows import DECODERS, DIFFUSERS
from .family import Family, Norm, Projection, RopeKind, Stack
from .grouped_rows import ZOO
from .kv_field import FalconField, MultiQueryField
from .plugins import add_entry_points
from .refused import why_refused

__all__ = [
    "FAMILIES",
    "TEXT_PREFIXES",
    "Family",
    "Norm",
    "Projection",
    "RopeKind",
    "Stack",
    "family_of",
    "register",
    "supported",
]

_PER_HEAD_NORMS = (Norm("q_norm", "q", "heads"), Norm("k_norm", "k", "heads"))
_FLAT_NORMS = (Norm("q_norm", "q", "flat"), Norm("k_norm", "k", "flat"))
_LIST_NORMS = (Norm("q_layernorm", "q", "list"), Norm("k_layernorm", "k", "list"))

#: where the language model sits in a checkpoint that also has other parts (`text_config` in its config)
TEXT_PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "model.text_model.",
    "language_model.",
    "text_model.",
    "llm.model.",
    "language_model.model.encoder.",  # Qianfan-OCR as transformers saves it
    "model.",
)

FAMILIES: list[Family] = [
    Family((
        "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "gemma", "gemma2", "granite", "granitemoe",
        "granitemoeshared", "olmo", "starcoder2", "arcee", "aria_text", "cwm", "hyperclovax", "jais2",
        "ministral", "ministral3", "phimoe", "seed_oss", "solar_open", "vaultgemma", "qwen2_vl_text", "qwen2_5_vl_text",
    )),
    Family(
        ("qwen3", "qwen3_moe", "gemma3_text", "exaone4", "exaone_moe", "apertus", "hunyuan_v1_dense"),
        (Stack(shared_qk_norm=True),),
    ),
    Family(
        ("qwen3_vl_text",),
        (Stack(shared_qk_norm=True),),
        other=(Family((), (replace(DIFFUSERS, shared_qk_norm=True),), ("",)),),  # Cosmos 3
    ),
    Family(("gpt_oss", "granite_swa", "granitemoe_swa"), (Stack(sinks="sinks"),)),
    Family(("ernie4_5", "ernie4_5_moe", "helium"), (Stack(rope="interleaved"),)),
    Family(("olmo2", "olmo3", "olmoe", "flex_olmo", "minimax_m2"), (Stack(norms=_FLAT_NORMS),)),
    Family(("smollm3",), (Stack(no_rope_layers="no_rope_layers"),)),
    Family(("cohere",), (Stack(norms=_PER_HEAD_NORMS, rope="interleaved"),)),
    Family(("cohere2",), (Stack(rope="interleaved", no_rope_layers="layer_types"),)),
    Family(("glm", "glm4"), (Stack(rope="interleaved", rotary_fraction=0.5),)),
    Family(("nemotron",), (Stack(rotary_fraction=0.5),)),
    Family(("phi",), (Stack(output="dense", shared_qk_norm=True, rotary_fraction=0.5),)),
    Family(("phi3",), (Stack(projections=(Projection("qkv_proj", "qkv"),)),)),
    Family(("stablelm",), (Stack(norms=_LIST_NORMS, rotary_fraction=0.25, head_dim=None),)),
    Family(
        ("falcon",),
        (
            Stack(
                layer="h.{i}.self_attention.",
                projections=(Projection("query_key_value", "qkv", "groups"),),
                output="dense",
                kv_field=FalconField(),
                head_dim=None,
                no_rope_layers="alibi",
                caches_query_heads=True,
            ),
        ),
        prefixes=("transformer.", ""),
    ),
    Family(
        ("gpt_bigcode",),
        (
            Stack(
                layer="h.{i}.attn.",
                projections=(Projection("c_attn", "qkv", "groups"),),
                output="c_proj",
                kv_field=MultiQueryField(),
                head_dim=None,
                rope="none",
            ),
        ),
        prefixes=("transformer.", ""),
    ),
    *DECODERS,
    *ZOO,
]  # fmt: skip


def register(family: Family) -> None:
    """Add a family to the table; one that names a ``model_type`` already there replaces it for that type.

    Packages that are to be known to the command line too declare an entry point (:mod:`.plugins`).
    """
    FAMILIES.append(family)


def supported() -> list[str]:
    """Every ``model_type`` of the table, sorted; with those that installed packages declare."""
    add_entry_points(register)
    return sorted({model_type for family in FAMILIES for model_type in family.model_types})


def family_of(model_type: str) -> Family:
    """The row of ``model_type``.

    Raises:
        ConversionError: there is none; says why, or names the nearest one and how to add it.
    """
    add_entry_points(register)
    for family in reversed(FAMILIES):
        if model_type in family.model_types:
            return family
    if reason := why_refused(model_type):
        raise ConversionError(f"{model_type!r} cannot be converted: {reason}")
    names = supported()
    near = difflib.get_close_matches(model_type, names, n=1, cutoff=0.0)
    raise ConversionError(
        f"model family {model_type!r} is not supported (nearest supported: {near[0] if near else names[0]!r}); "
        "to add it, describe where it keeps Q, K, V and O in a row of conversion/families/table.py"
    )
