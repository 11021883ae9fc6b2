"""Exact attention for Hugging Face models, with as few KV heads as you choose."""

from hf_attn_patch.grouping import GroupingError, KVGrouping

__version__ = "0.1.0"
__all__ = ["GroupingError", "KVGrouping"]
