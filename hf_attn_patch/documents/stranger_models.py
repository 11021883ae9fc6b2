"""A stranger's model before a library loads it: its config asks for what its files can hold, and for no code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hf_attn_patch.compat.transformers import set_attention_name
from hf_attn_patch.errors import ConversionError

from .stranger_json import check_model_folder, refuse_adapter

#: the files of weights that transformers reads
WEIGHTS = ("*.safetensors", "*.bin")
#: numbers in a byte of a file, at most: quantized ones take four bits or more
NUMBERS_PER_BYTE = 2


def config_of(name: str) -> Any:
    """A model's config, which chooses no attention: transformers fetches a kernel that a config names, and runs it.

    Args:
        name: a folder, or a hub id.

    Raises:
        ConversionError: it asks for too much, or an adapter lies in the folder, which transformers would load.
        Exception: whatever transformers refuses it with.
    """
    import transformers

    check_model_folder(name)
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        own = (path for pattern in WEIGHTS for path in folder.glob(pattern))
        refuse_adapter(folder, any(not path.name.startswith("adapter_") for path in own))
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    set_attention_name(config, "eager")
    return config


def check_model(name: str, auto_class: Any, config: Any) -> None:
    """Refuse a model that would be filled up with numbers of which its files have none.

    transformers makes every tensor that a checkpoint lacks, at random and in full, before it tells which they were.

    Args:
        name: a folder; anything else (a hub id) is left to transformers.
        auto_class: that will load it, such as ``AutoModelForCausalLM``.
        config: its config, by :func:`config_of`.

    Raises:
        ConversionError: the config asks for more than the files can hold.
        Exception: whatever transformers refuses the config with.
    """
    import torch

    folder = Path(os.path.expanduser(name))
    held = sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern) if path.is_file())
    if not held:
        return
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=False, attn_implementation="eager")
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > NUMBERS_PER_BYTE * held:
        raise ConversionError(
            f"{name}: config.json asks for {wanted:,} numbers, more than the {held:,} bytes of its weights can hold"
        )
