"""A stranger's JSON, bounded before anything is built from it: as text, and config.json as what it asks for.

transformers builds what a config says: a model of ``num_hidden_layers`` layers, a dictionary of ``num_labels`` names.
Such numbers are bounded here by what any real model has.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_attn_patch.errors import ConversionError

#: a key that counts modules or names that are built one by one -> the most that is believed
BOUNDS = (
    (re.compile(r"num_labels|n_labels"), 1_000_000),
    (re.compile(r"expert"), 65_536),
    (
        re.compile(r"(^|_)(n|num|number)_?(\w+_)?(layers?|blocks?|stages?|codebooks?|adapters?|hash(es|_functions)?)$"),
        1_024,
    ),
    (re.compile(r"layers?$|blocks?$|depths?$|stages?$|^n_layers?$|attention_types|layers_block_type"), 1_024),
)
#: of one JSON file: each takes some 64 bytes or more of memory, however few of the file
MAX_CONTAINERS = 1_000_000
#: no config, index or header is nested nearly as deep
MAX_DEPTH = 50
#: the longest config that is read, several times what the largest models have
CONFIG_BYTES = 4_000_000
#: of all lists in a config together
MAX_ENTRIES = 200_000


def check_model_folder(name: str) -> None:
    """Before a library builds a model from a folder: refuse a config that it could not bear.

    Args:
        name: a folder; anything else (a hub id) is left to the library.

    Raises:
        ConversionError: its config.json is too large, no JSON object, or asks for too much.
    """
    path = Path(os.path.expanduser(name)) / "config.json"
    if path.is_file():
        check_config_limits(parse_json_object(read_small(path, CONFIG_BYTES), str(path)), str(path))


def refuse_adapter(folder: Path, weights: bool) -> None:
    """A folder with an adapter is not the model that its config.json describes.

    Args:
        weights: whether it holds a model's weights too.

    Raises:
        ConversionError: there is an adapter_config.json in it.
    """
    if not (folder / "adapter_config.json").exists():
        return
    if not weights:
        raise ConversionError(f"{folder} holds an adapter, not a model: merge it into its base model first")
    raise ConversionError(
        f"{folder} holds weights and an adapter, which transformers would put on top of them: merge it (peft's "
        "merge_and_unload, then save_pretrained), or move adapter_config.json out of the folder to go without it"
    )


def read_small(path: Path, limit: int) -> bytes:
    """All of a file that has at most ``limit`` bytes.

    Raises:
        ConversionError: it has more, or cannot be read.
    """
    try:
        if path.stat().st_size > limit:
            raise ConversionError(f"{path} is too large to be what its name says (over {limit:,} bytes)")
        return path.read_bytes()
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from None


def check_config_limits(config: dict[str, Any], what: str) -> None:
    """Refuse a config that asks for more than any model has.

    Args:
        config: config.json, parsed.
        what: how messages name it.

    Raises:
        ConversionError: a number of layers, labels or the like is out of all proportion.

    >>> check_config_limits({"num_hidden_layers": 80, "num_labels": 2}, "config.json")
    """
    for count, (key, value) in enumerate(_numbers(config)):
        if count >= MAX_ENTRIES:
            raise ConversionError(f"{what} holds over {MAX_ENTRIES:,} values, far more than any model's config")
        for pattern, most in BOUNDS:
            if isinstance(value, int) and value > most and pattern.search(key):
                raise ConversionError(f"{what} says {key} = {value}, and no model has over {most}")


def _numbers(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(name of the nearest key, value) of everything in a config that is no container; iterative, so of any depth."""
    left = [(key, config)]
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left.extend((str(k), v) for k, v in value.items())
        elif isinstance(value, list):
            left.extend((name, v) for v in value)
        else:
            yield name, value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the name {key!r} stands twice")
        out[key] = value
    return out


def parse_json_object(raw: bytes, what: str) -> dict[str, Any]:
    """``raw`` as a JSON object; :class:`ConversionError` that names ``what`` for anything else."""
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS:
        raise ConversionError(f"{what} holds over {MAX_CONTAINERS:,} lists and objects, far more than any model's")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{what} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{what} is not a JSON object but a {type(value).__name__}")
    if b"\\ud" in raw.lower() and any(map(_is_broken, _texts(value))):
        raise ConversionError(f"{what} holds half a character (a lone surrogate), which no file can be written with")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [v for c in level for v in (c.values() if isinstance(c, dict) else c) if isinstance(v, (dict, list))]
        if not level:
            return value
    raise ConversionError(f"{what} is nested more than {MAX_DEPTH} deep")


def _texts(value: Any) -> Iterator[str]:
    """Every string in parsed JSON, keys included."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            yield from one
            left.extend(one.values())
        elif isinstance(one, list):
            left.extend(one)


def _is_broken(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
