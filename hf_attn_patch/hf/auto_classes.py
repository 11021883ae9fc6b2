"""Make transformers' Auto classes know the grouped families, without importing any of them.

The family of ``model_type`` "gpt2" is "gqa_gpt2" here, and every stock class ``GPT2...`` is ``GroupedGPT2...`` in
``hf_attn_patch.modeling.gpt2``. So the Auto classes' own tables of names say all there is to register, and a model file
is imported when the first of its names is asked for.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from hf_attn_patch.compat.ground import CompatError
from hf_attn_patch.compat.transformers import add_config_class, add_like, config_class_names

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
    when_imported("transformers.models.auto.configuration_auto", partial(_enter, _register_configs))
    for name in TABLES:
        when_imported(f"transformers.models.auto.{name}", partial(_enter, partial(_extend_tables, name)))


def _enter(action: Callable[[], None]) -> None:
    """Where transformers keeps its tables elsewhere, the Auto classes do not know us, and no import fails."""
    try:
        action()
    except CompatError as error:
        warnings.warn(f"AutoModel does not know the grouped families: {error}", RuntimeWarning, stacklevel=2)


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
    known = config_class_names()
    for file, stock_types in FAMILIES.items():
        for stock in stock_types:
            if stock in known:
                yield stock, PREFIX + stock, _FamilyFile(file)


def _register_configs() -> None:
    for stock, ours, file in list(_types()):
        add_config_class(ours, f"Grouped{config_class_names()[stock]}", file)


def _extend_tables(name: str) -> None:
    """Give each table of one of transformers' files an entry for our types wherever it has one for the stock type."""
    for stock, ours, file in _types():
        add_like(name, stock, ours, file, _grouped if TABLES[name] else lambda names: names)


def _grouped(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return f"Grouped{names}" if isinstance(names, str) else tuple(f"Grouped{n}" for n in names)
