"""GPT-NeoX (Pythia) with configurable KV heads."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import GPTNeoXConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox import modeling_gpt_neox as stock

from hf_attn_patch.compat.cache_keyword import update_cache
from hf_attn_patch.compat.model_classes import attention_name

from .grouped import (
    GroupedAttention,
    GroupedConfig,
    GroupedModel,
    KVGrouping,
    grouped_eager,
    share_checkpoint_names,
    split_groups,
)


class GroupedGPTNeoXConfig(GroupedConfig, GPTNeoXConfig):
    """GPT-NeoX's config, plus ``num_key_value_heads``."""

    model_type = "gqa_gpt_neox"

    num_key_value_heads: int | None = None


class GroupedGPTNeoXAttention(GroupedAttention, stock.GPTNeoXAttention):
    """``query_key_value`` holds, per KV head, its G queries, its key and its value."""

    eager = stock.eager_attention_forward

    @property
    def num_heads(self) -> int:
        return int(self.config.num_attention_heads)

    def narrow(self, groups: KVGrouping) -> None:
        self.groups = groups
        rows = groups.num_kv_heads * (groups.group_size + 2) * self.head_size
        self.set_width("query_key_value", rows)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = split_groups(self.query_key_value(hidden_states), self.groups, self.head_size)
        q, k = stock.apply_rotary_pos_emb(q, k, *position_embeddings)
        k, v = update_cache(self, k, v, kwargs)
        dropout = self.attention_dropout if self.training else 0.0
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention_name(self.config), grouped_eager
        )  # vLLM looks for it
        out, weights = attention(self, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.dense(out.reshape(*hidden_states.shape[:-1], -1)), weights


class GroupedGPTNeoX(GroupedModel):
    config_class = GroupedGPTNeoXConfig
    replaced: ClassVar[dict[type, type]] = {stock.GPTNeoXAttention: GroupedGPTNeoXAttention}


class GroupedGPTNeoXModel(GroupedGPTNeoX, stock.GPTNeoXModel): ...


class GroupedGPTNeoXForCausalLM(GroupedGPTNeoX, stock.GPTNeoXForCausalLM): ...


class GroupedGPTNeoXForSequenceClassification(GroupedGPTNeoX, stock.GPTNeoXForSequenceClassification): ...


class GroupedGPTNeoXForTokenClassification(GroupedGPTNeoX, stock.GPTNeoXForTokenClassification): ...


class GroupedGPTNeoXForQuestionAnswering(GroupedGPTNeoX, stock.GPTNeoXForQuestionAnswering): ...


share_checkpoint_names(GroupedGPTNeoXForCausalLM)
