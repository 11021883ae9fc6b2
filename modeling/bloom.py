"""BLOOM with configurable KV heads, through transformers' attention interface."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import BloomConfig
from transformers.models.bloom import modeling_bloom as stock

from hf_attn_patch.compat.cache_keyword import update_cache

from .grouped import (
    GroupedAttention,
    GroupedConfig,
    GroupedModelOutsideInterface,
    KVGrouping,
    attend,
    eager_with_bias,
    split_groups,
)


class GroupedBloomConfig(GroupedConfig, BloomConfig):
    """BLOOM's config, plus ``num_key_value_heads``. ALiBi belongs to the query heads and stays as it is.

    Raises:
        ValueError: ``slow_but_exact``, a rounding order of the first training run that only eager attention had.
    """

    model_type = "gqa_bloom"

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.slow_but_exact and self.pretraining_tp > 1:
            raise ValueError("gqa_bloom does not support slow_but_exact=True; set it to False")


class GroupedBloomAttention(GroupedAttention, stock.BloomAttention):
    """``query_key_value`` holds, per KV head, its G queries, its key and its value."""

    def narrow(self, groups: KVGrouping) -> None:
        self.groups = groups
        rows = groups.num_kv_heads * (groups.group_size + 2) * self.head_dim
        self.set_width("query_key_value", rows)

    def eager(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, position_bias: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # one fused multiply and add, as the stock module has it
        alibi = position_bias.flatten(0, 1)
        scores = alibi.baddbmm(q.flatten(0, 1), k.flatten(0, 1).transpose(-1, -2), alpha=self.inv_norm_factor)
        return eager_with_bias(q, k, v, mask, scores=scores.view(*q.shape[:3], -1), dropout=kwargs["dropout"])

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        *,
        alibi: Tensor,
        attention_mask: Tensor | None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = split_groups(self.query_key_value(hidden_states), self.groups, self.head_dim)
        k, v = update_cache(self, k, v, kwargs)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            scaling=self.inv_norm_factor,
            dropout=self.attention_dropout.p if self.training else 0.0,
            position_bias=alibi.view(q.shape[0], self.num_heads, 1, -1),
            output_attentions=output_attentions,
        )
        out = torch.nn.functional.dropout(self.dense(out), self.hidden_dropout, self.training)
        return residual + out, weights


class GroupedBloom(GroupedModelOutsideInterface):
    config_class = GroupedBloomConfig
    replaced: ClassVar[dict[type, type]] = {stock.BloomAttention: GroupedBloomAttention}


class GroupedBloomModel(GroupedBloom, stock.BloomModel): ...


class GroupedBloomForCausalLM(GroupedBloom, stock.BloomForCausalLM): ...


class GroupedBloomForSequenceClassification(GroupedBloom, stock.BloomForSequenceClassification): ...


class GroupedBloomForTokenClassification(GroupedBloom, stock.BloomForTokenClassification): ...


class GroupedBloomForQuestionAnswering(GroupedBloom, stock.BloomForQuestionAnswering): ...
