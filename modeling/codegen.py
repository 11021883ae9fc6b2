"""CodeGen with configurable KV heads, through transformers' attention interface."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import CodeGenConfig
from transformers.models.codegen import modeling_codegen as stock

from .grouped import GroupedAttention, GroupedConfig, GroupedModelOutsideInterface, KVGrouping, attend


class GroupedCodeGenConfig(GroupedConfig, CodeGenConfig):
    """CodeGen's config, plus ``num_key_value_heads``."""

    model_type = "gqa_codegen"

    num_key_value_heads: int | None = None


class GroupedCodeGenAttention(GroupedAttention, stock.CodeGenAttention):
    """``qkv_proj`` is made of blocks, each q, v, k of its share of the heads.

    The stock layout has four (the TPU cores of its training); with fewer than four KV heads, or a number that four does
    not divide, there are as many as divide both.
    """

    heads_attribute = "num_attention_heads"

    def narrow(self, groups: KVGrouping) -> None:
        self.blocks = math.gcd(4, groups.num_kv_heads)
        kv = groups.num_kv_heads * self.head_dim // self.blocks
        self.sizes = [self.embed_dim // self.blocks, kv, kv]
        self.set_width("qkv_proj", self.blocks * sum(self.sizes))

    def eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, weights = self._attn(q, k, v, mask)  # it has its own scaling and dropout
        return out.transpose(1, 2), weights

    def _rotate(self, x: Tensor, sincos: Tensor) -> Tensor:
        """Interleaved RoPE on the first ``rotary_dim`` dimensions of x [B, S, H, D]; gives [B, H, S, D]."""
        sin, cos = sincos.chunk(2, dim=-1)
        n = self.head_dim if self.rotary_dim is None else self.rotary_dim
        x = torch.cat([stock.apply_rotary_pos_emb(x[..., :n], sin, cos), x[..., n:]], dim=-1)
        return x.transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        blocks = self.qkv_proj(hidden_states).unflatten(-1, (self.blocks, -1)).split(self.sizes, dim=-1)
        q, v, k = (x.flatten(2).unflatten(-1, (-1, self.head_dim)) for x in blocks)
        sincos = self.embed_positions[position_ids]
        # the tables are fp32: scores are worked out so, and the cache keeps the model's dtype
        q, k, v = self._rotate(q, sincos).to(v.dtype), self._rotate(k, sincos).to(v.dtype), v.transpose(1, 2)
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            scaling=1 / self.scale_attn,
            dropout=self.attn_dropout.p if self.training else 0.0,
            output_attentions=output_attentions,
        )
        return self.resid_dropout(self.out_proj(out)), weights


class GroupedCodeGen(GroupedModelOutsideInterface):
    config_class = GroupedCodeGenConfig
    replaced: ClassVar[dict[type, type]] = {stock.CodeGenAttention: GroupedCodeGenAttention}


class GroupedCodeGenModel(GroupedCodeGen, stock.CodeGenModel): ...


class GroupedCodeGenForCausalLM(GroupedCodeGen, stock.CodeGenForCausalLM): ...
