"""The command ``hf-attn``."""

from __future__ import annotations

from hf_attn_patch.moved import names_from

from .main import main

__all__ = ["main"]

__getattr__ = names_from("hf_attn_patch.cli.main", ["COMMANDS", "EXAMPLES", "EXIT_CODES", "LazyGroup", "SECTIONS"])
