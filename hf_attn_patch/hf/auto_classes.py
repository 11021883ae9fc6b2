"""Make transformers' Auto classes know the grouped families, without importing any of them.

The family of ``model_type`` "gpt2" is "gqa_gpt2" here, and every stock class ``GPT2...`` is ``GroupedGPT2...`` in
``hf_attn_patch.modeling.gpt2``. So the Auto classes' own tables of names say all there is to register, and a model file
is imported when the first of its names is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from .registration import when_imported

PREFIX = "gqa_"

#: file in hf_attn_patch.modeling -> the stock model types that it covers
FAMILIES: dict[str, tuple[str, ...]] = {
    "bart": ("bart",),
    "bert": ("bert",),
    "biogpt": ("biogpt",),
    "bloom": ("bloom",),
    "clip": ("clip", "clip_text_model", "clip_vision_model"),
    "codegen": ("codegen",),
    "distilbert": ("distilbert",),
    "electra": ("electra",),
    "falcon": ("falcon",),
    "gpt2": ("gpt2",),
    "gpt_neo": ("gpt_neo",),
    "gpt_neox": ("gpt_neox",),
    "gptj": ("gptj",),
    "marian": ("marian",),
    "mbart": ("mbart",),
    "mpt": ("mpt",),
    "mt5": ("mt5",),
    "opt": ("opt",),
    "roberta": ("roberta",),
    "t5": ("t5",),
    "vit": ("vit",),
    "whisper": ("whisper",),
}


#: transformers' file with tables of names -> whether its names are of model classes, which have their own here
TABLES = {
    "modeling_auto": True,
    "tokenization_auto": False,
    "processing_auto": False,
    "image_processing_auto": False,
    "feature_extraction_auto": False,
    "video_processing_auto": False,
}


def file_of(model_type: str) -> str:
    """The file of ``hf_attn_patch.modeling`` that has one of our model types.

    >>> file_of("gqa_clip_text_model")
    'clip'
    """
    for file, stock_types in FAMILIES.items():
        if model_type.startswith(PREFIX) and model_type.removeprefix(PREFIX) in stock_types:
            return file
    raise KeyError(f"{model_type!r} is none of the families of hf_attn_patch.modeling")


def register() -> None:
    """Enter every family into ``AutoConfig`` and the ``AutoModel...`` classes, once those are imported."""
    when_imported("transformers.models.auto.configuration_auto", _register_configs)
    for name in TABLES:
        when_imported(f"transformers.models.auto.{name}", partial(_extend_tables, name))


class _FamilyFile:
    """Stands where transformers expects a family's module; imports ours when a name is asked for."""

    def __init__(self, name: str) -> None:
        self._file = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("Grouped"):
            return getattr(importlib.import_module(f"hf_attn_patch.modeling.{self._file}"), name)
        return getattr(importlib.import_module("transformers"), name)  # tokenizers and the like are the stock ones


def _types() -> Iterator[tuple[str, str, _FamilyFile]]:
    """(stock model type, ours, our file) of every family that this transformers has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for file, stock_types in FAMILIES.items():
        for stock in stock_types:
            if stock in CONFIG_MAPPING_NAMES:
                yield stock, PREFIX + stock, _FamilyFile(file)


def _register_configs() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    for stock, ours, file in list(_types()):
        CONFIG_MAPPING_NAMES[ours] = f"Grouped{CONFIG_MAPPING_NAMES[stock]}"
        CONFIG_MAPPING._modules[ours] = file


def _extend_tables(name: str) -> None:
    """Give each table of one of transformers' files an entry for our types wherever it has one for the stock type."""
    from transformers.models.auto.auto_factory import _LazyAutoMapping

    tables = list(vars(importlib.import_module(f"transformers.models.auto.{name}")).values())
    for table in tables:
        if not isinstance(table, _LazyAutoMapping):
            continue
        for stock, ours, file in _types():
            if stock in table._model_mapping:
                names = table._model_mapping[stock]
                table._model_mapping[ours] = _grouped(names) if TABLES[name] else names
                table._reverse_config_mapping[table._config_mapping[ours]] = ours
                table._modules[ours] = file


def _grouped(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return f"Grouped{names}" if isinstance(names, str) else tuple(f"Grouped{n}" for n in names)
