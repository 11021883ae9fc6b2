"""RoBERTa with configurable KV heads."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import RobertaConfig
from transformers.models.roberta import modeling_roberta as stock

from .grouped import DecoderGroupedConfig, GroupedAttention, GroupedModel


class GroupedRobertaConfig(DecoderGroupedConfig, RobertaConfig):
    """RoBERTa's config, plus ``num_key_value_heads`` and, for decoders with cross-attention, ``cross_kv_heads``."""

    model_type = "gqa_roberta"

    num_key_value_heads: int | None = None
    cross_kv_heads: int | None = None


class GroupedRobertaSelfAttention(GroupedAttention, stock.RobertaSelfAttention):
    kv_projections = ("key", "value")
    heads_attribute = "num_attention_heads"
    eager = stock.eager_attention_forward


class GroupedRobertaCrossAttention(GroupedAttention, stock.RobertaCrossAttention):
    kv_projections = ("key", "value")
    heads_attribute = "num_attention_heads"
    eager = stock.eager_attention_forward

    def kv_heads(self, config: Any) -> int:
        return int(config.cross_kv_heads)


class GroupedRoberta(GroupedModel):
    config_class = GroupedRobertaConfig
    replaced: ClassVar[dict[type, type]] = {
        stock.RobertaSelfAttention: GroupedRobertaSelfAttention,
        stock.RobertaCrossAttention: GroupedRobertaCrossAttention,
    }


class GroupedRobertaModel(GroupedRoberta, stock.RobertaModel): ...


class GroupedRobertaForCausalLM(GroupedRoberta, stock.RobertaForCausalLM): ...


class GroupedRobertaForMaskedLM(GroupedRoberta, stock.RobertaForMaskedLM): ...


class GroupedRobertaForSequenceClassification(GroupedRoberta, stock.RobertaForSequenceClassification): ...


class GroupedRobertaForMultipleChoice(GroupedRoberta, stock.RobertaForMultipleChoice): ...


class GroupedRobertaForTokenClassification(GroupedRoberta, stock.RobertaForTokenClassification): ...


class GroupedRobertaForQuestionAnswering(GroupedRoberta, stock.RobertaForQuestionAnswering): ...
