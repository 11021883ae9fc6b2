"""Which tensor goes into which output file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hf_attn_patch.errors import ConversionError

from .reader import SINGLE, Source

#: room for tokenizer, journal and file system beside the weights
MARGIN = 32 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """An output file and the tensors in it, in order."""

    name: str
    tensors: tuple[str, ...]


def same_shards(source: Source, nbytes: Mapping[str, int]) -> tuple[Shard, ...]:
    """The source's own sharding (files that keep no tensor disappear)."""
    members: dict[int, list[str]] = {}
    for name in nbytes:
        members.setdefault(source.tensors[name].file, []).append(name)
    lists = [
        sorted(members[number], key=lambda name: (source.tensors[name].offset, name))
        if not source.pickled
        else members[number]
        for number in sorted(members)
    ]
    return _named(lists)


def split_shards(nbytes: Mapping[str, int], max_bytes: int) -> tuple[Shard, ...]:
    """Files of at most ``max_bytes`` (a tensor larger than that has a file of its own), in the order given."""
    if max_bytes < 1:
        raise ConversionError(f"a shard of {max_bytes} bytes holds nothing; give a size such as 5GB")
    lists: list[list[str]] = []
    room = -1
    for name, size in nbytes.items():
        if size > room or not lists:
            lists.append([])
            room = max_bytes
        lists[-1].append(name)
        room -= size
    return _named(lists)


def _named(lists: list[list[str]]) -> tuple[Shard, ...]:
    if len(lists) == 1:
        return (Shard(SINGLE, tuple(lists[0])),)
    total = len(lists)
    return tuple(Shard(f"model-{i + 1:05d}-of-{total:05d}.safetensors", tuple(names)) for i, names in enumerate(lists))


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB``, ``500MB``, ``2GiB`` or ``100000``.

    >>> parse_size("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConversionError(f"{text!r} is no size; write for example 5GB or 500MB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise ConversionError(f"a shard of {text!r} holds nothing; give a size such as 5GB")
    return size
