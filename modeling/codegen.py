"""CodeGen with configurable KV heads, through transformers' attention interface."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor
from transformers import CodeGenConfig
from transformers.models.codegen import modeling_codegen as stock

from .grouped import GroupedConfig, GroupedModelOutsideInterface, KVGrouping
from .rotary import TableRotaryAttention


class GroupedCodeGenConfig(GroupedConfig, CodeGenConfig):
    """CodeGen's config, plus ``num_key_value_heads``."""

    model_type = "gqa_codegen"

    num_key_value_heads: int | None = None


class GroupedCodeGenAttention(TableRotaryAttention, stock.CodeGenAttention):
    """``qkv_proj`` is made of blocks, each q, v, k of its share of the heads.

    The stock layout has four (the TPU cores of its training); with fewer than four KV heads, or a number that four does
    not divide, there are as many as divide both.
    """

    stock = stock
    rotates_in_fp32 = True

    def narrow(self, groups: KVGrouping) -> None:
        self.blocks = math.gcd(4, groups.num_kv_heads)
        kv = groups.num_kv_heads * self.head_dim // self.blocks
        self.sizes = [self.embed_dim // self.blocks, kv, kv]
        self.set_width("qkv_proj", self.blocks * sum(self.sizes))

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        blocks = self.qkv_proj(hidden_states).unflatten(-1, (self.blocks, -1)).split(self.sizes, dim=-1)
        q, v, k = (x.flatten(2).unflatten(-1, (-1, self.head_dim)) for x in blocks)
        return q, k, v


class GroupedCodeGen(GroupedModelOutsideInterface):
    config_class = GroupedCodeGenConfig
    continuous_batching = hasattr(stock, "eager_attention_forward")  # in the interface, from transformers 5.24
    replaced: ClassVar[dict[type, type]] = {stock.CodeGenAttention: GroupedCodeGenAttention}


class GroupedCodeGenModel(GroupedCodeGen, stock.CodeGenModel): ...


class GroupedCodeGenForCausalLM(GroupedCodeGen, stock.CodeGenForCausalLM): ...
