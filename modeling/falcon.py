"""Falcon with configurable KV heads, through transformers' attention interface.

Every Falcon can be told its KV heads here: those that had none (multi_query=False), the multi-query ones and the "new
decoder architecture", whose stock code copies each KV head to all its query heads before it caches them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import FalconConfig
from transformers.models.falcon import modeling_falcon as stock

from .grouped import (
    GroupedAttention,
    GroupedConfig,
    GroupedModelOutsideInterface,
    KVGrouping,
    attend,
    eager_with_bias,
    split_groups,
    with_width,
)


class GroupedFalconConfig(GroupedConfig, FalconConfig):
    """Falcon's config, plus ``num_key_value_heads`` (by default what the stock fields say)."""

    model_type = "gqa_falcon"

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            if self.new_decoder_architecture:
                self.num_key_value_heads = self.num_kv_heads
            elif self.multi_query:
                self.num_key_value_heads = 1
        super().__post_init__(**kwargs)
        self.num_kv_heads = self.num_key_value_heads


class GroupedFalconAttention(GroupedAttention, stock.FalconAttention):
    """``query_key_value`` holds, per KV head, its G queries, its key and its value; so do all three stock layouts."""

    def narrow(self, groups: KVGrouping) -> None:
        self.groups = groups
        self.num_kv_heads = groups.num_kv_heads
        rows = groups.num_kv_heads * (groups.group_size + 2) * self.head_dim
        self.query_key_value = with_width(self.query_key_value, rows)

    def eager(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-1, -2) / self.head_dim**0.5  # divided, as the stock module does
        if kwargs.get("position_bias") is not None:
            scores = scores + kwargs["position_bias"]
        return eager_with_bias(q, k, v, mask, scores=scores, dropout=kwargs["dropout"])

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = split_groups(self.query_key_value(hidden_states), self.groups, self.head_dim)
        if alibi is None:
            assert position_embeddings is not None
            q, k = stock.apply_rotary_pos_emb(q, k, *position_embeddings)
            kwargs["dropout"] = 0.0  # the stock module drops out only with ALiBi
        else:
            kwargs["dropout"] = self.attention_dropout.p if self.training else 0.0
            if alibi.dim() == 3:  # of four dimensions, it is in the mask already
                bias = alibi.view(q.shape[0], self.num_heads, 1, -1) * self.inv_norm_factor
                kwargs["position_bias"] = bias
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        out, weights = attend(
            self, q, k, v, attention_mask, scaling=self.inv_norm_factor, output_attentions=output_attentions, **kwargs
        )
        return self.dense(out), weights


class GroupedFalcon(GroupedModelOutsideInterface):
    config_class = GroupedFalconConfig
    replaced = {stock.FalconAttention: GroupedFalconAttention}


class GroupedFalconModel(GroupedFalcon, stock.FalconModel): ...


class GroupedFalconForCausalLM(GroupedFalcon, stock.FalconForCausalLM): ...


class GroupedFalconForSequenceClassification(GroupedFalcon, stock.FalconForSequenceClassification): ...


class GroupedFalconForTokenClassification(GroupedFalcon, stock.FalconForTokenClassification): ...


class GroupedFalconForQuestionAnswering(GroupedFalcon, stock.FalconForQuestionAnswering): ...
