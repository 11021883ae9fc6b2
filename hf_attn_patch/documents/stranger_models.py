"""A stranger's model, before a library loads it: what its config asks for must be what its files can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_attn_patch.errors import ConversionError

from .stranger_json import check_model_folder

#: the files of weights that transformers reads
WEIGHTS = ("*.safetensors", "*.bin")
#: numbers in a byte of a file, at most: quantized ones take four bits or more
NUMBERS_PER_BYTE = 2


def check_model(name: str, auto_class: Any, config: Any = None) -> None:
    """Refuse a model that would be filled up with numbers of which its files have none.

    transformers makes every tensor that a checkpoint lacks, at random and in full, before it tells which they were.

    Args:
        name: a folder; anything else (a hub id) is left to transformers.
        auto_class: that will load it, such as ``AutoModelForCausalLM``.
        config: its config, if it was read already.

    Raises:
        ConversionError: the config asks for too much by itself, or for more than the files can hold.
        Exception: whatever transformers refuses the config with.
    """
    import torch
    import transformers

    check_model_folder(name)
    folder = Path(name).expanduser()
    held = sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern) if path.is_file())
    if not held:
        return
    config = config or transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=False, attn_implementation="eager")
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > NUMBERS_PER_BYTE * held:
        raise ConversionError(
            f"{name}: config.json asks for {wanted:,} numbers, more than the {held:,} bytes of its weights can hold"
        )
