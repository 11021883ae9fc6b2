"""OPT with configurable KV heads."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import OPTConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.opt import modeling_opt as stock

from hf_attn_patch.compat.cache_keyword import update_cache
from hf_attn_patch.compat.model_classes import attention_name

from .grouped import GroupedAttention, GroupedConfig, GroupedModel, grouped_eager, split_heads


class GroupedOPTConfig(GroupedConfig, OPTConfig):
    """OPT's config, plus ``num_key_value_heads``."""

    model_type = "gqa_opt"

    num_key_value_heads: int | None = None


class GroupedOPTAttention(GroupedAttention, stock.OPTAttention):
    """The stock forward writes the number of query heads into the shape of K and V, so this one is its own."""

    eager = stock.eager_attention_forward

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        q = split_heads(self.q_proj(hidden_states) * self.scaling, self.head_dim)  # scaled before the scores, as stock
        k = split_heads(self.k_proj(hidden_states), self.head_dim)
        v = split_heads(self.v_proj(hidden_states), self.head_dim)
        k, v = update_cache(self, k, v, kwargs)
        dropout = self.dropout if self.training else 0.0
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention_name(self.config), grouped_eager
        )  # vLLM looks for it
        out, weights = attention(self, q, k, v, attention_mask, scaling=1.0, dropout=dropout, **kwargs)
        return self.out_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class GroupedOPT(GroupedModel):
    config_class = GroupedOPTConfig
    replaced: ClassVar[dict[type, type]] = {stock.OPTAttention: GroupedOPTAttention}


class GroupedOPTModel(GroupedOPT, stock.OPTModel): ...


class GroupedOPTForCausalLM(GroupedOPT, stock.OPTForCausalLM): ...


class GroupedOPTForSequenceClassification(GroupedOPT, stock.OPTForSequenceClassification): ...


class GroupedOPTForQuestionAnswering(GroupedOPT, stock.OPTForQuestionAnswering): ...
