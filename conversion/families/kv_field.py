"""Where a config keeps its number of KV heads, and how another number is written there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_attn_patch.errors import ConversionError

from .layer_config import layer_overrides

#: how a config may give layers numbers of their own: not at all; as a list; by transformers' ``per_layer_config``, a
#: number for each layer, or one for all layers of a type
PerLayer = Literal["none", "list", "layers", "types"]


@dataclass(frozen=True, slots=True)
class KVField:
    """A config attribute that holds HKV; absent or None means HQ.

    ``varies``: how layers may have numbers of their own. ``twice``: layers of this type have twice the attribute's
    number (MiMo V2 Flash).
    """

    name: str = "num_key_value_heads"
    varies: PerLayer = "none"
    twice: str | None = None

    @property
    def per_layer(self) -> bool:
        """Whether layers may have numbers of their own."""
        return self.varies != "none"

    def read(self, config: Any, heads: int) -> int | list[int]:
        """HKV by the config object, the whole model's or a layer's (a list: one per layer)."""
        value = getattr(config, self.name, None)
        return heads if value is None else value

    def of_layer(self, config: Any, heads: int, layer: int) -> Any:
        """HKV of one layer by its config."""
        value = self.read(config, heads)
        if isinstance(value, (list, tuple)):
            return value[layer]
        return 2 * value if self._doubled(config, layer) and isinstance(value, int) else value

    def wanted(self, config: Any, number: int, layer: int) -> int:
        """What a layer is to have where the user asks for ``number`` in all of them."""
        return 2 * number if self._doubled(config, layer) else number

    def _doubled(self, config: Any, layer: int) -> bool:
        types = getattr(config, "layer_types", None) or ()
        return self.twice is not None and layer < len(types) and types[layer] == self.twice

    def write(self, raw: dict[str, Any], config: Any, heads: int, kv_heads: Mapping[int, int]) -> None:
        """Change ``raw``, the JSON of the config, so that layer i has ``kv_heads[i]`` KV heads.

        Args:
            kv_heads: by the index of the layer; layers without this attention are not in it.

        Raises:
            ConversionError: this architecture cannot say so.
        """
        numbers = {i: n // 2 if self._doubled(config, i) else n for i, n in kv_heads.items()}
        if any(self._doubled(config, i) and n % 2 for i, n in kv_heads.items()):
            raise ConversionError(
                f"layers of {self.twice} have twice {self.name}, so their KV heads are even in number"
            )
        if self.varies in ("layers", "types"):
            raw.update(self._by_layer(raw, config, heads, numbers))
        else:
            raw[self.name] = self._number(list(numbers.values()))

    def _number(self, kv_heads: Sequence[int]) -> int | list[int]:
        if len(set(kv_heads)) <= 1:
            return kv_heads[0]
        if self.varies != "list":
            raise ConversionError(
                f"this architecture has one {self.name} for all layers, so it cannot have "
                f"{format_numbers(kv_heads)} KV heads in its layers; give one number"
            )
        return list(kv_heads)

    def _by_layer(self, raw: Mapping[str, Any], config: Any, heads: int, numbers: Mapping[int, int]) -> dict[str, Any]:
        """The entries of a config that say so: one number for most layers, ``per_layer_config`` for the others.

        Layers that are not named (they read another layer's cache) get what others of their type have.
        """
        types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
        of_type: dict[Any, set[int]] = {}
        for i, n in numbers.items():
            of_type.setdefault(types[i], set()).add(n)
        if self.varies == "types" and any(len(found) > 1 for found in of_type.values()):
            mixed = next(name for name, found in of_type.items() if len(found) > 1)
            raise ConversionError(
                f"this architecture has one number of KV heads for all layers of a type, so its {mixed} layers cannot "
                f"have {format_numbers([n for i, n in numbers.items() if types[i] == mixed])}"
            )
        usual = max(set(numbers.values()), key=list(numbers.values()).count)
        layers = layer_overrides(config)
        for i, kind in enumerate(types):
            number = numbers.get(i, min(of_type.get(kind, {usual})))
            own = layers.setdefault(i, {})
            own.pop(self.name, None)
            if number != usual:
                own[self.name] = number
        out: dict[str, Any] = {self.name: usual, "per_layer_config": {str(i): o for i, o in layers.items() if o}}
        legacy = "num_global_key_value_heads"  # what Gemma 4's checkpoints on the hub have in its place
        if raw.get(legacy) is not None and "full_attention" in of_type:
            out[legacy] = min(of_type["full_attention"])
        legacy, field = "attention_other_setting", "num_attention_groups"  # Step 3.5's: of its sliding layers
        if isinstance(raw.get(legacy), Mapping) and field in raw[legacy] and "sliding_attention" in of_type:
            out[legacy] = {**raw[legacy], field: min(of_type["sliding_attention"])}
        return out


@dataclass(frozen=True, slots=True)
class NestedField(KVField):
    """HKV in a config inside the config (DBRX)."""

    inside: str = "attn_config"

    def read(self, config: Any, heads: int) -> int | list[int]:
        return super(NestedField, self).read(getattr(config, self.inside), heads)

    def write(self, raw: dict[str, Any], config: Any, heads: int, kv_heads: Mapping[int, int]) -> None:
        number = self._number(list(kv_heads.values()))
        raw[self.inside] = {**(raw.get(self.inside) or {}), self.name: number}


@dataclass(frozen=True, slots=True)
class EvenField(KVField):
    """An even number of KV heads: DiffLlama's two attentions have half of the values each."""

    def write(self, raw: dict[str, Any], config: Any, heads: int, kv_heads: Mapping[int, int]) -> None:
        if any(n % 2 for n in kv_heads.values()):
            raise ConversionError("this architecture splits its KV heads into halves: their number must be even")
        super(EvenField, self).write(raw, config, heads, kv_heads)


@dataclass(frozen=True, slots=True)
class FalconField(KVField):
    """Falcon: ``new_decoder_architecture`` with ``num_kv_heads``, else ``multi_query`` (1) or every head its own."""

    name: str = "num_kv_heads"

    def read(self, config: Any, heads: int) -> int | list[int]:
        if config.new_decoder_architecture:
            return heads if config.num_kv_heads is None else config.num_kv_heads
        return 1 if config.multi_query else heads

    def write(self, raw: dict[str, Any], config: Any, heads: int, kv_heads: Mapping[int, int]) -> None:
        number = self._number(list(kv_heads.values()))
        if config.new_decoder_architecture:
            raw["num_kv_heads"] = number
        elif number == 1:
            raw.update(multi_query=True, num_kv_heads=1)
        elif number != self.read(config, heads):
            if not config.parallel_attn:
                raise ConversionError(
                    f"a Falcon with parallel_attn=false can have {heads} KV heads or 1, not {number}; use --kv-heads 1"
                )
            # the new architecture with one layer norm computes what the old parallel one does
            raw.update(new_decoder_architecture=True, num_ln_in_parallel_attn=1, num_kv_heads=number)


@dataclass(frozen=True, slots=True)
class MultiQueryField(KVField):
    """GPT-BigCode: ``multi_query`` or every head its own."""

    name: str = "multi_query"

    def read(self, config: Any, heads: int) -> int | list[int]:
        return 1 if config.multi_query else heads

    def write(self, raw: dict[str, Any], config: Any, heads: int, kv_heads: Mapping[int, int]) -> None:
        number = self._number(list(kv_heads.values()))
        if number not in (1, heads):
            raise ConversionError(
                f"gpt_bigcode can have {heads} KV heads or 1 (multi_query), not {number}; use --kv-heads 1"
            )
        raw["multi_query"] = number == 1


def format_numbers(numbers: Sequence[int]) -> str:
    """A list of numbers, shortened where it repeats.

    >>> format_numbers([8, 8, 8, 4])
    '8 x3, 4'
    """
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][0] == n:
            runs[-1][1] += 1
        else:
            runs.append([n, 1])
    return ", ".join(str(n) if times == 1 else f"{n} x{times}" for n, times in runs)
