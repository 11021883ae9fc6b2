"""A plan as data. Who makes, prints or measures plans imports this file, never the other way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .checkpoints.reader import Source
from .checkpoints.safetensors_header import tensor_nbytes
from .checkpoints.shards import MARGIN, Shard
from .families.config import answers, speaks
from .families.layer import LayerAttention
from .families.table import Family, Norm, Projection
from .methods.method import Method

KVHeads = int | Sequence[int] | Mapping[str, int | Sequence[int]]


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor of the result: ``unit`` is the number of the unit that computes it, None: copied as it is."""

    dtype: str
    shape: tuple[int, ...]
    unit: int | None = None

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors of one layer that must be read together, and what is written from them."""

    layer: LayerAttention
    projections: tuple[Projection, ...]
    norms: tuple[Norm, ...] = ()
    output: bool = False
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass
class Plan:
    """What a conversion will do: ``planner.py`` makes it, ``reports/report.py`` tells it, ``execute.py`` does it."""

    source: Source
    family: Family
    model_type: str
    config: Any  # the transformers config object of the whole model
    text_config: Any  # of the language model in it (often the same object)
    new_config: dict[str, Any]  # config.json of the result
    layers: tuple[LayerAttention, ...]
    method: Method
    options: dict[str, Any]
    seed: int
    requested: KVHeads
    units: tuple[Unit, ...] = ()
    tensors: dict[str, NewTensor] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    warnings: tuple[str, ...] = ()
    with_code: bool = False  # the result carries the code of its model class

    @property
    def speaks(self) -> bool:
        """Whether the source is a causal language model by itself, which can write text of its own."""
        return speaks(self.source.config, self.family, self.config, self.text_config)

    @property
    def answers(self) -> bool:
        """Whether the source is an encoder-decoder with a head, which can say something of what it reads."""
        return answers(self.source.config, self.config, self.text_config)

    @property
    def bytes_before(self) -> int:
        return sum(t.nbytes for t in self.source.tensors.values())

    @property
    def bytes_after(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def disk_needed(self) -> int:
        """Bytes that must be free where the result is written."""
        return self.bytes_after + MARGIN

    def unit_inputs(self, unit: Unit) -> int:
        return sum(self.source.tensors[name].nbytes for name in unit.reads)
