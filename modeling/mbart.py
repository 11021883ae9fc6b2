"""mBART with configurable KV heads."""

from __future__ import annotations

from typing import ClassVar

from transformers import MBartConfig
from transformers.models.mbart import modeling_mbart as stock

from .grouped import GroupedModel, Seq2SeqGroupedAttention, Seq2SeqGroupedConfig


class GroupedMBartConfig(Seq2SeqGroupedConfig, MBartConfig):
    """mBART's config, plus the KV heads of the encoder, the decoder and the cross-attention."""

    model_type = "gqa_mbart"

    encoder_kv_heads: int | None = None
    decoder_kv_heads: int | None = None
    cross_kv_heads: int | None = None


class GroupedMBartAttention(Seq2SeqGroupedAttention, stock.MBartAttention):
    eager = stock.eager_attention_forward


class GroupedMBart(GroupedModel):
    config_class = GroupedMBartConfig
    replaced: ClassVar[dict[type, type]] = {stock.MBartAttention: GroupedMBartAttention}


class GroupedMBartModel(GroupedMBart, stock.MBartModel): ...


class GroupedMBartForConditionalGeneration(GroupedMBart, stock.MBartForConditionalGeneration): ...


class GroupedMBartForCausalLM(GroupedMBart, stock.MBartForCausalLM): ...


class GroupedMBartForSequenceClassification(GroupedMBart, stock.MBartForSequenceClassification): ...


class GroupedMBartForQuestionAnswering(GroupedMBart, stock.MBartForQuestionAnswering): ...
