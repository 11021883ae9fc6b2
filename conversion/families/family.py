"""What a row of ``table.py`` is made of: a family, its attentions, and where their weights lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .kv_field import KVField

RopeKind = Literal["half", "interleaved", "none"]


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer that makes some of q, k and v.

    Attributes:
        module: its name below the layer's prefix.
        holds: what its outputs are, in order: ``"q"``, ``"kv"``, ``"qkv"``, ``"qvk"``, ``"qg"`` (g: a gate for each
            query head, elementwise on what attention gives it), ...
        form: ``"rows"``: all heads of the first, then all heads of the next; ``"heads"``: for each head one of each;
            ``"groups"``: for each KV head its G query heads, then its k, then its v (with G = 1: per head q, k, v; with
            one KV head: the same as rows).
        blocks: with ``"rows"``: the whole pattern repeats this often, each time for a share of the heads (CodeGen: 4,
            or as many as divide the number of KV heads too).
        transposed: the weight is [in, out], as in GPT-2's Conv1D.
        optional: a layer without it takes the keys (before their norm and RoPE) for values (Gemma 4).
    """

    module: str
    holds: str
    form: Literal["rows", "groups", "heads"] = "rows"
    blocks: int = 1
    transposed: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Norm:
    """Gains that belong to heads of q or k (a norm with one gain [D] for all heads needs no entry: it stays).

    Attributes:
        module: its name below the layer's prefix.
        of: ``"q"`` or ``"k"``.
        form: ``"heads"``: weight [heads, D]; ``"flat"``: weight [heads * D], normalised over all heads together;
            ``"list"``: one ``{module}.norms.{head}.weight`` [D] per head.
        or_shared: it may also be one gain [D] for all heads, by the config; then it stays.
    """

    module: str
    of: Literal["q", "k"]
    form: Literal["heads", "flat", "list"]
    or_shared: bool = False


@dataclass(frozen=True, slots=True)
class Stack:
    """One kind of attention that a model has in each of its layers (a decoder's own, its cross-attention, ...).

    ``layer`` is what the checkpoint has before the modules' names, ``called`` what the model has where that is another.
    ``part`` leads to the config inside the model's that describes it (``"decoder"``; empty: the model's own), which is
    where everything below is read and written.

    ``num_layers``, ``heads``, ``head_dim``, ``value_dim``, ``width``, ``q_width`` and ``kv_width`` name config
    attributes: the number of layers, HQ, D (absent or None: E // HQ), the width of a value head (None: D), E, and the
    widths of what Q and what K and V are made from (None: E). ``heads`` may be a list with one number for each layer.

    What stands between a projection and where its basis no longer matters is said by the row, because most of it has no
    tensors: ``keys_fixed`` for K (a norm without gains), ``values_fixed`` for V and O (a gate for each dimension, a
    norm). K or V of such layers are averaged where others are turned into a common basis. Each is a bool, or the name
    of a config attribute that decides.
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
    shared_qk_norm: bool = False  # a norm with one gain [D] for all heads may stand between projection and scores
    keys_fixed: bool | str = False
    values_fixed: bool | str = False
    others: tuple[str, ...] = ()  # what else belongs to the attention and stays as it is, whatever its KV heads
    ordered_heads: bool = False  # one of the others goes by a query head's index (a gate for each head): never permute
    sparse: bool = False  # only some layers have it (hybrids): those whose tensors are there
    called: str | None = None
    part: str = ""
    kv_field: KVField = field(default_factory=KVField)
    num_layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    head_dim: str | None = "head_dim"
    value_dim: str | None = None
    width: str = "hidden_size"
    q_width: str | None = None
    kv_width: str | None = None
    rope: RopeKind = "half"
    rotary_fraction: float = 1.0  # where the config does not say
    rotary_dim: str | None = None  # config attribute that gives the rotary dimensions as a number
    no_rope_layers: Literal["layer_types", "no_rope_layers", "alibi"] | None = None  # see _rope in layer.py
    fixed_heads: bool = False  # a query head's index means something (ALiBi slopes, relative bias): never permute
    cross: bool = False  # K and V come from the encoder
    causal: bool = True
    cached: bool = True  # keys and values are kept from one step to the next; those of an encoder beside a decoder not
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
        reads: what goes into the model.
        other: other names and layouts that checkpoints of these models have (as published, as a part of another model);
            their ``prefixes`` and ``stacks`` count where those of the row itself are not found.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...] = (Stack(),)
    prefixes: tuple[str, ...] = ("model.", "")
    becomes: str | None = None
    reads: Literal["text", "sound", "pictures", "pictures and text", "text and codes of sound"] = "text"
    other: tuple[Family, ...] = ()
