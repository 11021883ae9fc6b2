"""What model classes of one's own need of transformers' private names, known from 5.17 to 5.24.

This file travels inside checkpoints (``--with-code``), so it stands on transformers alone; what is gone there ends in
an AttributeError of one sentence.
"""

from __future__ import annotations

import warnings
from typing import Any

from transformers import __version__

KNOWN = "which is known from transformers 5.17 to 5.24; install one of those"


def attention_name(config: Any) -> str | None:
    """The attention implementation that a config asks for.

    >>> from transformers import LlamaConfig
    >>> attention_name(LlamaConfig(attn_implementation="sdpa"))
    'sdpa'
    """
    try:
        name: str | None = config._attn_implementation
    except AttributeError as error:
        raise _gone(type(config), "_attn_implementation") from error
    return name


def set_attention_name(config: Any, name: str | None) -> None:
    """Ask for another implementation in this config alone, without the checks of ``set_attn_implementation``."""
    attention_name(config)  # gone: an error, not a new attribute that nobody reads
    config._attn_implementation = name


def initialise_again(module: Any) -> None:
    """Let transformers give a module new weights, though a part of it had some."""
    module._is_hf_initialized = False


class InsideInterface:
    """Mixin of a model class whose attention asks transformers' interface, though its own file does not say so:
    transformers looks for the interface in the source of the class's module."""

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


def map_checkpoint_names(model_class: type, stock_name: str) -> None:
    """Let a class read the older weight names that transformers maps for the stock class ``stock_name``.

    Where transformers keeps that map elsewhere, a warning says so, and checkpoints with older names do not load whole
    (which ``from_pretrained`` reports).
    """
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError as error:
        message = f"{model_class.__name__} does not read older weight names: {error}, {KNOWN}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return
    if (mapping := get_checkpoint_conversion_mapping(stock_name)) is not None:
        register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)


def _gone(owner: type, name: str) -> AttributeError:
    return AttributeError(f"{owner.__name__} of transformers {__version__} has no {name}, {KNOWN}")
