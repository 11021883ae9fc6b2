"""The numbers of one attention layer: heads, widths, RoPE. Read from a config through the family table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_attn_patch.errors import ConversionError, GroupingError
from hf_attn_patch.grouping import KVGrouping

from .table import Norm, Projection, RopeKind, Stack


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer of one stack: HQ, HKV before and after, D, E, and how positions enter.

    Attributes:
        prefix: what stands before the module names, e.g. ``model.layers.3.self_attn.``.
        rope: the pairing of rotary planes: "half" pairs (i, i + rotary_dims / 2), "interleaved" (2i, 2i + 1).
        rotary_dims: how many of the D dimensions, from the first on, rotate; the others carry no position.
        fixed_heads: a query head's index means something, so heads may not be permuted.
        keeps: tokens that its cache holds at most (sliding windows, chunks; 0: it reads another layer's); None: all.
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
    keeps: int | None = None

    def kept(self, tokens: int) -> int:
        """Of so many tokens, those whose K and V this layer keeps."""
        return tokens if self.keeps is None else min(tokens, self.keeps)

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

    def rows(self, projection: Projection, kv_heads: int) -> int:
        """Outputs of a projection when there are ``kv_heads`` KV heads."""
        return sum(self.heads if role == "q" else kv_heads for role in projection.holds) * self.head_dim

    def inputs(self, projection: Projection) -> int:
        return self.kv_width if "k" in projection.holds or "v" in projection.holds else self.width

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
    heads, width = positive(config, stack.heads, where), positive(config, stack.width, where)
    num_layers = positive(config, stack.num_layers, where)
    kv = stack.kv_field.read(config, heads)
    per_layer = list(kv) if isinstance(kv, (list, tuple)) else None
    if per_layer is not None and len(per_layer) != num_layers:
        raise ConversionError(f"{where} gives {len(per_layer)} numbers of KV heads for {num_layers} layers")
    explicit = attribute(config, stack.head_dim) if stack.head_dim else None
    if explicit is None and width % heads:
        raise ConversionError(f"{where} gives {heads} heads for a width of {width}, which does not divide evenly")
    head_dim = width // heads if explicit is None else positive(config, stack.head_dim or "", where)
    kv_width = positive(config, stack.kv_width, where) if stack.kv_width else width
    layers = []
    for i in range(num_layers):
        number = kv if per_layer is None else per_layer[i]
        if isinstance(number, bool) or not isinstance(number, int) or number >= ABSURD:
            raise ConversionError(f"{where} gives no usable {stack.kv_field.name}: {number!r}")
        try:
            KVGrouping(heads, number)
        except GroupingError as error:
            raise ConversionError(f"{where} is inconsistent: {error}") from None
        rope, rotary = _rope(stack, config, i, head_dim)
        fixed = stack.fixed_heads or bool(stack.no_rope_layers == "alibi" and getattr(config, "alibi", False))
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
                fixed,
                None if stack.cross else _keeps(config, i, num_layers),
            )
        )
    return layers


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
