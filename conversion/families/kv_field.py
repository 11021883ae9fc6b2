"""Where a config keeps its number of KV heads, and how another number is written there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_attn_patch.errors import ConversionError


@dataclass(frozen=True, slots=True)
class KVField:
    """A config attribute that holds HKV; absent or None means HQ.

    ``per_layer``: the attribute may be a list with one number for each layer.
    """

    name: str = "num_key_value_heads"
    per_layer: bool = False

    def read(self, config: Any, heads: int) -> int | list[int]:
        """HKV by the config object (a list: one per layer)."""
        value = getattr(config, self.name, None)
        return heads if value is None else value

    def write(self, raw: dict[str, Any], config: Any, heads: int, kv_heads: Sequence[int]) -> None:
        """Change ``raw``, the JSON of the config, so that layer i has ``kv_heads[i]`` KV heads."""
        raw[self.name] = self._number(kv_heads)

    def _number(self, kv_heads: Sequence[int]) -> int | list[int]:
        if len(set(kv_heads)) <= 1:
            return kv_heads[0]
        if not self.per_layer:
            raise ConversionError(
                f"this architecture has one {self.name} for all layers, so it cannot have "
                f"{format_numbers(kv_heads)} KV heads in its layers; give one number"
            )
        return list(kv_heads)


@dataclass(frozen=True, slots=True)
class FalconField(KVField):
    """Falcon: ``new_decoder_architecture`` with ``num_kv_heads``, else ``multi_query`` (1) or every head its own."""

    name: str = "num_kv_heads"

    def read(self, config: Any, heads: int) -> int | list[int]:
        if config.new_decoder_architecture:
            return heads if config.num_kv_heads is None else int(config.num_kv_heads)
        return 1 if config.multi_query else heads

    def write(self, raw: dict[str, Any], config: Any, heads: int, kv_heads: Sequence[int]) -> None:
        number = self._number(kv_heads)
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

    def write(self, raw: dict[str, Any], config: Any, heads: int, kv_heads: Sequence[int]) -> None:
        number = self._number(kv_heads)
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
