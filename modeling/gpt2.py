"""GPT-2 with configurable KV heads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GPT2Config
from transformers.models.gpt2 import modeling_gpt2 as stock

from .grouped import DecoderGroupedConfig, GroupedAttention, GroupedModel, KVGrouping, eager_with_bias


class GroupedGPT2Config(DecoderGroupedConfig, GPT2Config):
    """GPT-2's config, plus ``num_key_value_heads`` and, for decoders with cross-attention, ``cross_kv_heads``."""

    model_type = "gqa_gpt2"

    num_key_value_heads: int | None = None
    cross_kv_heads: int | None = None


class GroupedGPT2Attention(GroupedAttention, stock.GPT2Attention):
    """``c_attn`` is a Conv1D whose columns are q [E], k [HKV * D], v [HKV * D] (cross-attention: k, v)."""

    def kv_heads(self, config: Any) -> int:
        return int(config.cross_kv_heads) if self.is_cross_attention else super().kv_heads(config)

    def narrow(self, groups: KVGrouping) -> None:
        kv = groups.num_kv_heads * self.head_dim
        self.split_size = [kv, kv] if self.is_cross_attention else [self.embed_dim, kv, kv]
        self.set_width("c_attn", sum(self.split_size))

    def eager(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.reorder_and_upcast_attn:  # the stock forward asks for it only where it reads "eager"
            with torch.autocast(query.device.type, enabled=False):
                scores = query.float() @ key.float().transpose(-1, -2) * self.scaling
            return eager_with_bias(query, key, value, mask, scores=scores, dropout=kwargs.get("dropout", 0.0))
        return stock.eager_attention_forward(self, query, key, value, mask, **kwargs)


class GroupedGPT2(GroupedModel):
    config_class = GroupedGPT2Config
    replaced: ClassVar[dict[type, type]] = {stock.GPT2Attention: GroupedGPT2Attention}


class GroupedGPT2Model(GroupedGPT2, stock.GPT2Model): ...


class GroupedGPT2LMHeadModel(GroupedGPT2, stock.GPT2LMHeadModel): ...


class GroupedGPT2DoubleHeadsModel(GroupedGPT2, stock.GPT2DoubleHeadsModel): ...


class GroupedGPT2ForSequenceClassification(GroupedGPT2, stock.GPT2ForSequenceClassification): ...


class GroupedGPT2ForTokenClassification(GroupedGPT2, stock.GPT2ForTokenClassification): ...


class GroupedGPT2ForQuestionAnswering(GroupedGPT2, stock.GPT2ForQuestionAnswering): ...
