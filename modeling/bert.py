"""BERT with configurable KV heads."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import BertConfig
from transformers.models.bert import modeling_bert as stock

from .grouped import DecoderGroupedConfig, GroupedAttention, GroupedModel


class GroupedBertConfig(DecoderGroupedConfig, BertConfig):
    """BERT's config, plus ``num_key_value_heads`` and, for decoders with cross-attention, ``cross_kv_heads``."""

    model_type = "gqa_bert"

    num_key_value_heads: int | None = None
    cross_kv_heads: int | None = None


class GroupedBertSelfAttention(GroupedAttention, stock.BertSelfAttention):
    kv_projections = ("key", "value")
    heads_attribute = "num_attention_heads"
    eager = stock.eager_attention_forward


class GroupedBertCrossAttention(GroupedAttention, stock.BertCrossAttention):
    kv_projections = ("key", "value")
    heads_attribute = "num_attention_heads"
    eager = stock.eager_attention_forward

    def kv_heads(self, config: Any) -> int:
        return int(config.cross_kv_heads)


class GroupedBert(GroupedModel):
    config_class = GroupedBertConfig
    replaced: ClassVar[dict[type, type]] = {
        stock.BertSelfAttention: GroupedBertSelfAttention,
        stock.BertCrossAttention: GroupedBertCrossAttention,
    }


class GroupedBertModel(GroupedBert, stock.BertModel): ...


class GroupedBertForPreTraining(GroupedBert, stock.BertForPreTraining): ...


class GroupedBertLMHeadModel(GroupedBert, stock.BertLMHeadModel): ...


class GroupedBertForMaskedLM(GroupedBert, stock.BertForMaskedLM): ...


class GroupedBertForNextSentencePrediction(GroupedBert, stock.BertForNextSentencePrediction): ...


class GroupedBertForSequenceClassification(GroupedBert, stock.BertForSequenceClassification): ...


class GroupedBertForMultipleChoice(GroupedBert, stock.BertForMultipleChoice): ...


class GroupedBertForTokenClassification(GroupedBert, stock.BertForTokenClassification): ...


class GroupedBertForQuestionAnswering(GroupedBert, stock.BertForQuestionAnswering): ...
