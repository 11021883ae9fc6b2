"""GPT-J with configurable KV heads, through transformers' attention interface."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from transformers import GPTJConfig
from transformers.models.gptj import modeling_gptj as stock

from .grouped import GroupedConfig, GroupedModelOutsideInterface
from .rotary import TableRotaryAttention


class GroupedGPTJConfig(GroupedConfig, GPTJConfig):
    """GPT-J's config, plus ``num_key_value_heads``."""

    model_type = "gqa_gptj"

    num_key_value_heads: int | None = None


class GroupedGPTJAttention(TableRotaryAttention, stock.GPTJAttention):
    stock = stock

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v


class GroupedGPTJ(GroupedModelOutsideInterface):
    config_class = GroupedGPTJConfig
    continuous_batching = hasattr(stock, "eager_attention_forward")  # in the interface, from transformers 5.24
    replaced: ClassVar[dict[type, type]] = {stock.GPTJAttention: GroupedGPTJAttention}


class GroupedGPTJModel(GroupedGPTJ, stock.GPTJModel): ...


class GroupedGPTJForCausalLM(GroupedGPTJ, stock.GPTJForCausalLM): ...


class GroupedGPTJForSequenceClassification(GroupedGPTJ, stock.GPTJForSequenceClassification): ...


class GroupedGPTJForQuestionAnswering(GroupedGPTJ, stock.GPTJForQuestionAnswering): ...
