"""BART with configurable KV heads."""

from __future__ import annotations

from typing import ClassVar

from transformers import BartConfig
from transformers.models.bart import modeling_bart as stock

from .grouped import GroupedModel, Seq2SeqGroupedAttention, Seq2SeqGroupedConfig


class GroupedBartConfig(Seq2SeqGroupedConfig, BartConfig):
    """BART's config, plus the KV heads of the encoder, the decoder and the cross-attention."""

    model_type = "gqa_bart"

    encoder_kv_heads: int | None = None
    decoder_kv_heads: int | None = None
    cross_kv_heads: int | None = None


class GroupedBartAttention(Seq2SeqGroupedAttention, stock.BartAttention):
    eager = stock.eager_attention_forward


class GroupedBart(GroupedModel):
    config_class = GroupedBartConfig
    replaced: ClassVar[dict[type, type]] = {stock.BartAttention: GroupedBartAttention}


class GroupedBartModel(GroupedBart, stock.BartModel): ...


class GroupedBartForConditionalGeneration(GroupedBart, stock.BartForConditionalGeneration): ...


class GroupedBartForCausalLM(GroupedBart, stock.BartForCausalLM): ...


class GroupedBartForSequenceClassification(GroupedBart, stock.BartForSequenceClassification): ...


class GroupedBartForQuestionAnswering(GroupedBart, stock.BartForQuestionAnswering): ...
