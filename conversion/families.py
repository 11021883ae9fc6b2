"""Where each model family keeps Q, K, V and O, and the numbers of heads: data, read by everything in this package.

To add a family, add a :class:`Family` to :data:`FAMILIES` (or call :func:`register`). Names of tensors are made of
``prefix + stack.layer.format(i=layer) + module + ".weight"`` or ``".bias"``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Literal

from .errors import ConversionError
from .kvfield import FalconField, KVField, MultiQueryField

RopeKind = Literal["half", "interleaved", "none"]


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer that makes some of q, k and v.

    Attributes:
        module: its name below the layer's prefix.
        holds: what its outputs are, in order: ``"q"``, ``"kv"``, ``"qkv"``, ``"qvk"``, ...
        form: ``"rows"``: all heads of the first, then all heads of the next; ``"groups"``: for each KV head its G
            query heads, then its k, then its v (with G = 1: per head q, k, v; with one KV head: the same as rows).
        blocks: with ``"rows"``: the whole pattern repeats this often, each time for a share of the heads (CodeGen: 4,
            or as many as divide the number of KV heads too).
        transposed: the weight is [in, out], as in GPT-2's Conv1D.
    """

    module: str
    holds: str
    form: Literal["rows", "groups"] = "rows"
    blocks: int = 1
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Norm:
    """Gains that belong to heads of q or k (a norm with one gain [D] for all heads needs no entry: it stays).

    Attributes:
        module: its name below the layer's prefix.
        of: ``"q"`` or ``"k"``.
        form: ``"heads"``: weight [heads, D]; ``"flat"``: weight [heads * D], normalised over all heads together;
            ``"list"``: one ``{module}.norms.{head}.weight`` [D] per head.
    """

    module: str
    of: Literal["q", "k"]
    form: Literal["heads", "flat", "list"]


@dataclass(frozen=True, slots=True)
class Stack:
    """One kind of attention that a model has in each of its layers (a decoder's own, its cross-attention, ...).

    ``num_layers``, ``heads``, ``head_dim``, ``width`` and ``kv_width`` name config attributes: the number of layers,
    HQ, D (absent or None: E // HQ), E, and the width of what K and V are made from (cross-attention; None: E).
    """

    name: str = "self"
    layer: str = "layers.{i}.self_attn."
    projections: tuple[Projection, ...] = (
        Projection("q_proj", "q"),
        Projection("k_proj", "k"),
        Projection("v_proj", "v"),
    )
    output: str = "o_proj"
    output_transposed: bool = False
    norms: tuple[Norm, ...] = ()
    sinks: str | None = None  # a tensor [HQ]
    shared_qk_norm: bool = False  # a norm with one gain [D] for all heads stands between projection and scores
    kv_field: KVField = field(default_factory=KVField)
    num_layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    head_dim: str | None = "head_dim"
    width: str = "hidden_size"
    kv_width: str | None = None
    rope: RopeKind = "half"
    rotary_fraction: float = 1.0  # where the config does not say
    rotary_dim: str | None = None  # config attribute that gives the rotary dimensions as a number
    no_rope_layers: Literal["layer_types", "no_rope_layers", "alibi"] | None = None  # see Stack.rope_of in heads.py
    fixed_heads: bool = False  # a query head's index means something (ALiBi slopes, relative bias): never permute
    cross: bool = False  # K and V come from the encoder
    causal: bool = True
    caches_query_heads: bool = False  # the cache holds HQ heads whatever the number of KV heads (Falcon)
    written: tuple[Projection, ...] | None = None  # the layout of the grouped model where it is another
    optional: bool = False  # a model of the family may lack this attention: it has it if layer 0's tensors are there


@dataclass(frozen=True, slots=True)
class Family:
    """A family of checkpoints.

    Attributes:
        model_types: the ``model_type`` in config.json.
        stacks: its attentions.
        prefixes: what may stand before ``stack.layer``; the first under which layer 0 is found is used.
        becomes: the ``model_type`` of the grouped model where the stock config has no field for KV heads (of
            ``hf_attn_patch.modeling``, where the stock class X is GroupedX).
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...] = (Stack(),)
    prefixes: tuple[str, ...] = ("model.", "")
    becomes: str | None = None


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
    "model.",
)

FAMILIES: list[Family] = [
    Family((
        "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "gemma", "gemma2", "granite", "granite_swa", "granitemoe",
        "granitemoe_swa", "granitemoeshared", "olmo", "starcoder2", "arcee", "aria_text", "cwm", "hyperclovax", "jais2",
        "ministral", "ministral3", "phimoe", "seed_oss", "solar_open", "vaultgemma", "qwen2_vl_text", "qwen2_5_vl_text",
    )),
    Family(
        ("qwen3", "qwen3_moe", "gemma3_text", "exaone4", "exaone_moe", "apertus", "hunyuan_v1_dense", "qwen3_vl_text"),
        (Stack(shared_qk_norm=True),),
    ),
    Family(("gpt_oss",), (Stack(sinks="sinks"),)),
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
]  # fmt: skip


def register(family: Family) -> None:
    """Add a family to the table; one that names a ``model_type`` already there replaces it for that type."""
    FAMILIES.append(family)


def supported() -> list[str]:
    """Every ``model_type`` of the table, sorted."""
    return sorted({model_type for family in FAMILIES for model_type in family.model_types})


def family_of(model_type: str) -> Family:
    """The row of ``model_type``.

    Raises:
        ConversionError: there is none; names the nearest one and how to add it.
    """
    for family in reversed(FAMILIES):
        if model_type in family.model_types:
            return family
    names = supported()
    near = difflib.get_close_matches(model_type, names, n=1, cutoff=0.0)
    raise ConversionError(
        f"model family {model_type!r} is not supported (nearest supported: {near[0] if near else names[0]!r}); "
        "to add it, describe where it keeps Q, K, V and O in a row of conversion/families.py"
    )


from .zoo_families import ZOO  # noqa: E402 - the rows of our own model classes, made of the classes above

FAMILIES += ZOO
