"""Modules and model families with configurable KV heads.

The families are transformers' own models with a number of KV heads, under the model types ``gqa_gpt2``, ``gqa_bert``,
...; the Auto classes know them once ``hf_attn_patch`` is imported. :class:`GroupedQueryAttention` is the plain module.
"""

from .attention import GroupedQueryAttention
from .positions import Alibi, RelativeBias, Rope

__all__ = ["Alibi", "GroupedQueryAttention", "RelativeBias", "Rope"]
