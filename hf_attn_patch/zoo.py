"""Make transformers' Auto classes know the grouped families, without importing any of them.

The family of ``model_type`` "gpt2" is "gqa_gpt2" here, and every stock class ``GPT2...`` is ``GroupedGPT2...`` in
``hf_attn_patch.modeling.gpt2``. So the Auto classes' own tables of names say all there is to register, and a model file
is imported when the first of its names is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

PREFIX = "gqa_"

#: file in hf_attn_patch.modeling -> the stock model types that it covers
FAMILIES: dict[str, tuple[str, ...]] = {
    "bart": ("bart",),
    "bert": ("bert",),
    "bloom": ("bloom",),
    "clip": ("clip", "clip_text_model", "clip_vision_model"),
    "codegen": ("codegen",),
    "distilbert": ("distilbert",),
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


class _FamilyFile:
    """Stands where transformers expects a family's module; imports ours when a name is asked for."""

    def __init__(self, name: str) -> None:
        self._file = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("Grouped"):
            module = importlib.import_module(f"hf_attn_patch.modeling.{self._file}")
            _register_preprocessors()
            return getattr(module, name)
        return getattr(importlib.import_module("transformers"), name)  # tokenizers and the like are the stock ones


def register() -> None:
    """Enter every family into ``AutoConfig`` and the ``AutoModel...`` classes. Calling it again changes nothing."""
    from transformers.models.auto import configuration_auto, modeling_auto

    configs = configuration_auto.CONFIG_MAPPING_NAMES
    for file, stock_types in FAMILIES.items():
        for stock in stock_types:
            if stock in configs:
                configs[PREFIX + stock] = f"Grouped{configs[stock]}"
                configuration_auto.CONFIG_MAPPING._modules[PREFIX + stock] = _FamilyFile(file)
    _extend(modeling_auto, _grouped)


def _register_preprocessors() -> None:
    """Tokenizers, processors and the like: the stock family's. Put off until a family is used, as they import much."""
    for name in ("tokenization", "processing", "image_processing", "feature_extraction", "video_processing"):
        _extend(importlib.import_module(f"transformers.models.auto.{name}_auto"), lambda names: names)


def _grouped(names: Any) -> Any:
    return f"Grouped{names}" if isinstance(names, str) else tuple(f"Grouped{n}" for n in names)


def _extend(auto_file: Any, rename: Any) -> None:
    """Give each table of ``auto_file`` an entry for our types wherever it has one for the stock type."""
    from transformers.models.auto.auto_factory import _LazyAutoMapping

    for table in list(vars(auto_file).values()):
        if not isinstance(table, _LazyAutoMapping):
            continue
        for file, stock_types in FAMILIES.items():
            for stock in stock_types:
                if stock in table._model_mapping and stock in table._config_mapping:
                    ours = PREFIX + stock
                    table._model_mapping[ours] = rename(table._model_mapping[stock])
                    table._reverse_config_mapping[table._config_mapping[ours]] = ours
                    table._modules[ours] = _FamilyFile(file)
