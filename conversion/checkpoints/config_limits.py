"""What a stranger's config.json may ask for, before anything is built from it.

transformers builds what a config says: a model of ``num_hidden_layers`` layers, a dictionary of ``num_labels`` names.
Such numbers are bounded here by what any real model has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hf_attn_patch.errors import ConversionError

#: a key that counts modules or names that are built one by one -> the most that is believed
BOUNDS = (
    (re.compile(r"num_labels|n_labels"), 1_000_000),
    (re.compile(r"expert"), 65_536),
    (re.compile(r"(^|_)(n|num|number)_?(\w+_)?(layers?|blocks?|stages?|codebooks?|adapters?|hash\w*)$"), 4_096),
    (re.compile(r"layers?$|blocks?$|depths?$|stages?$|^n_layers?$|attention_types|layers_block_type"), 4_096),
)
#: of all lists in a config together
MAX_ENTRIES = 200_000


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
