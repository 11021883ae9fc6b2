"""The numbers of one attention layer: heads, widths, RoPE. Read from a config through the family table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_attn_patch.errors import ConversionError, GroupingError
from hf_attn_patch.grouping import KVGrouping

from .layer_config import layer_config
from .table import Norm, Projection, RopeKind, Stack


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer of one stack: HQ, HKV before and after, D and Dv, E, and how positions enter.

    Attributes:
        prefix: what stands before the module names, e.g. ``model.layers.3.self_attn.``.
        rope: the pairing of rotary planes: "half" pairs (i, i + rotary_dims / 2), "interleaved" (2i, 2i + 1).
        rotary_dims: how many of the D dimensions, from the first on, rotate; the others carry no position.
        value_dim: Dv, the width of a value head; D but in few families.
        width, q_width, kv_width: of what O writes, of what Q, and of what K and V read.
        fixed_heads: a query head's index means something, so heads may not be permuted.
        keys_fixed, values_fixed: something after K's (V's) projection knows its basis, so it may not be changed.
        caches: keys and values are kept from one step to the next.
        keeps: tokens that its cache holds at most (sliding windows, chunks; 0: it reads another layer's); None: all.
        heard: of cross-attention, how many positions the encoder always gives (Whisper); None: one for each token.
    """

    stack: Stack
    index: int
    prefix: str
    heads: int
    kv_heads: int
    new_kv_heads: int
    head_dim: int
    width: int
    kv_width: int
    rope: RopeKind
    rotary_dims: int
    fixed_heads: bool
    keys_fixed: bool = False
    values_fixed: bool = False
    keeps: int | None = None
    value_dim: int = 0  # 0: head_dim
    q_width: int = 0  # 0: width
    caches: bool = True
    heard: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)
        object.__setattr__(self, "q_width", self.q_width or self.width)

    def kept(self, tokens: int) -> int:
        """Of so many tokens, those whose K and V this layer keeps."""
        if self.heard is not None:
            return self.heard if tokens else 0
        return tokens if self.keeps is None else min(tokens, self.keeps)

    @property
    def readers(self) -> list[str]:
        """The projections that read what the attention reads: what makes Q, in cross-attention also what makes K."""
        roles = ("q", "k") if self.stack.cross else ("q",)
        return [next(p.module for p in self.stack.projections if role in p.holds) for role in roles]

    @property
    def grouping(self) -> KVGrouping:
        """Query heads and the KV heads of the source."""
        return KVGrouping(self.heads, self.kv_heads)

    @property
    def merged(self) -> tuple[range, ...]:
        """For each new KV head the present ones that it replaces."""
        return self.grouping.merged(self.new_kv_heads)

    @property
    def changes(self) -> bool:
        return self.new_kv_heads != self.kv_heads

    def name(self, module: str, what: str = "weight") -> str:
        """The full name of a tensor of this layer."""
        return f"{self.prefix}{module}.{what}"

    def dim(self, role: str) -> int:
        """The width of a head of q, k (D), v or the gate g (Dv)."""
        return self.head_dim if role in "qk" else self.value_dim

    def rows(self, projection: Projection, kv_heads: int) -> int:
        """Outputs of a projection when there are ``kv_heads`` KV heads."""
        return sum((self.heads if role in "qg" else kv_heads) * self.dim(role) for role in projection.holds)

    def inputs(self, projection: Projection) -> int:
        return self.kv_width if "k" in projection.holds or "v" in projection.holds else self.q_width

    def count(self, norm: Norm, kv_heads: int) -> int:
        """How many heads' gains a norm has."""
        return self.heads if norm.of == "q" else kv_heads


def of_one_number(stacks: Iterable[Stack]) -> list[Stack]:
    """The attentions that a single number of KV heads is for: those with a cache; all where none or every one has."""
    found = list(dict.fromkeys(stacks))
    return [stack for stack in found if stack.cached] or found


#: no model is near this; a config that says more would only keep us counting
ABSURD = 1 << 24


def attribute(config: Any, name: str) -> Any:
    """A config attribute, None if it is absent; ``text_config.hidden_size`` is that of a config inside."""
    for part in name.split("."):
        config = getattr(config, part, None)
    return config


def config_of(stack: Stack, config: Any) -> Any:
    """The config that describes a stack: the model's, or the one inside it."""
    return attribute(config, stack.part) if stack.part else config


def positive(config: Any, name: str, where: str) -> int:
    """A config attribute that must be a whole number of at least 1."""
    value = attribute(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < ABSURD:
        raise ConversionError(f"{where} gives no usable {name}: {value!r}")
    return value


def whole(config: Any, name: str) -> int | None:
    """A config attribute that may be absent, and is a whole number of at least 0 where it is not."""
    value = getattr(config, name, None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62):
        raise ConversionError(f"config.json gives no usable {name}: {value!r}")
    return value


def _layer_list(config: Any, name: str, kind: type) -> list[Any] | None:
    """A config attribute that may be absent, and is a list of ``kind``, one for each layer, where it is not."""
    value = getattr(config, name, None)
    if value is not None and not (isinstance(value, (list, tuple)) and all(isinstance(one, kind) for one in value)):
        raise ConversionError(f"config.json gives no usable {name}: {value!r}")
    return None if value is None else list(value)


def stack_layers(stack: Stack, config: Any, where: str) -> list[LayerAttention]:
    """Every layer of a stack as the config describes it, nothing changed yet (prefixes without the model's own)."""
    config = config_of(stack, config)
    width, num_layers = positive(config, stack.width, where), positive(config, stack.num_layers, where)
    q_width, kv_width = (positive(config, name, where) if name else width for name in (stack.q_width, stack.kv_width))
    alibi = bool(stack.no_rope_layers == "alibi" and getattr(config, "alibi", False))
    layers = []
    for i in range(num_layers):
        own = layer_config(config, i)
        heads = _heads(stack, own, i, num_layers, where)
        head_dim = _head_dim(stack, own, heads, width, where)
        rope, rotary = _rope(stack, own, i, head_dim)
        number = _kv_heads(stack, own, heads, i, num_layers, where)
        layers.append(
            LayerAttention(
                stack,
                i,
                stack.layer.format(i=i),
                heads,
                number,
                number,
                head_dim,
                width,
                kv_width,
                rope,
                rotary,
                stack.fixed_heads or alibi,
                holds(stack.keys_fixed, own),
                holds(stack.values_fixed, own),
                None if stack.cross else _keeps(config, i, num_layers),
                positive(own, stack.value_dim, where) if stack.value_dim else head_dim,
                q_width,
                stack.cached and (stack.causal or stack.cross or bool(getattr(config, "is_decoder", False))),
                whole(config, "max_source_positions") if stack.cross else None,
            )
        )
    return layers


def holds(fact: bool | str, config: Any) -> bool:
    """A fact of a row: by itself, or by the config attribute of that name."""
    return bool(attribute(config, fact)) if isinstance(fact, str) else fact


def _heads(stack: Stack, config: Any, layer: int, num_layers: int, where: str) -> int:
    """HQ of one layer."""
    value = attribute(config, stack.heads)
    if not isinstance(value, (list, tuple)):
        return positive(config, stack.heads, where)
    if len(value) != num_layers or isinstance(value[layer], bool) or not isinstance(value[layer], int):
        raise ConversionError(f"{where} gives no usable {stack.heads}: {value!r}")
    if not 1 <= value[layer] < ABSURD:
        raise ConversionError(f"{where} gives no usable {stack.heads}: {value[layer]!r}")
    return int(value[layer])


def _head_dim(stack: Stack, config: Any, heads: int, width: int, where: str) -> int:
    explicit = attribute(config, stack.head_dim) if stack.head_dim else None
    if explicit is not None:
        return positive(config, stack.head_dim or "", where)
    if width % heads:
        raise ConversionError(f"{where} gives {heads} heads for a width of {width}, which does not divide evenly")
    return width // heads


def _kv_heads(stack: Stack, config: Any, heads: int, layer: int, num_layers: int, where: str) -> int:
    """HKV of one layer."""
    listed = stack.kv_field.read(config, heads)
    if isinstance(listed, (list, tuple)) and len(listed) != num_layers:
        raise ConversionError(f"{where} gives {len(listed)} numbers of KV heads for {num_layers} layers")
    number = stack.kv_field.of_layer(config, heads, layer)
    if isinstance(number, bool) or not isinstance(number, int) or number >= ABSURD:
        raise ConversionError(f"{where} gives no usable {stack.kv_field.name}: {number!r}")
    try:
        KVGrouping(heads, number)
    except GroupingError as error:
        raise ConversionError(f"{where} is inconsistent: {error}") from None
    return number


def _keeps(config: Any, layer: int, num_layers: int) -> int | None:
    """How many tokens a layer's cache holds at most, as transformers' DynamicCache reads it from a config."""
    if layer >= num_layers - (whole(config, "num_kv_shared_layers") or 0):
        return 0  # Gemma 3n, Gemma 4: the last layers read the cache of an earlier one
    sizes = {
        "sliding_attention": whole(config, "sliding_window"),
        "chunked_attention": whole(config, "attention_chunk_size"),
    }
    types = _layer_list(config, "layer_types", str)
    if types is None:  # one kind of layer
        return sizes["sliding_attention"] or sizes["chunked_attention"]
    return sizes.get(types[layer]) if layer < len(types) else None


def _rope(stack: Stack, config: Any, layer: int, head_dim: int) -> tuple[RopeKind, int]:
    """RoPE of one layer: its kind and how many dimensions rotate."""
    if stack.rope == "none":
        return "none", 0
    if stack.no_rope_layers == "alibi" and getattr(config, "alibi", False):
        return "none", 0
    if stack.no_rope_layers == "layer_types":  # Cohere 2: only the sliding layers rotate
        types = _layer_list(config, "layer_types", str)
        if types and layer < len(types) and types[layer] != "sliding_attention":
            return "none", 0
    if stack.no_rope_layers == "no_rope_layers":  # SmolLM 3: 1 where RoPE is used, 0 where it is not
        used = _layer_list(config, "no_rope_layers", int)
        if used and layer < len(used) and not used[layer]:
            return "none", 0
    if stack.rotary_dim is not None:
        return stack.rope, whole(config, stack.rotary_dim) or head_dim
    parameters = getattr(config, "rope_parameters", None)
    types = getattr(config, "layer_types", None)
    if isinstance(parameters, Mapping) and types and layer < len(types) and types[layer] in parameters:
        parameters = parameters[types[layer]]  # RoPE by the type of layer
    fraction = parameters.get("partial_rotary_factor") if isinstance(parameters, Mapping) else None
    if fraction is None:
        fraction = getattr(config, "partial_rotary_factor", None)
    fraction = stack.rotary_fraction if fraction is None else fraction
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise ConversionError(f"config.json gives no usable partial_rotary_factor: {fraction!r}")
    return stack.rope, int(head_dim * fraction)


def norm_tensors(layer: LayerAttention, norm: Norm, kv_heads: int) -> dict[str, tuple[int, ...]]:
    """The norm's tensors and their shapes with that many KV heads."""
    count, D = layer.count(norm, kv_heads), layer.head_dim
    if norm.form == "list":
        return {f"{layer.prefix}{norm.module}.norms.{h}.weight": (D,) for h in range(count)}
    return {layer.name(norm.module): (count, D) if norm.form == "heads" else (count * D,)}
