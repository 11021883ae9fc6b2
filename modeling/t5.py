"""T5 with configurable KV heads."""

from __future__ import annotations

from typing import ClassVar

from transformers import T5Config
from transformers.models.t5 import modeling_t5 as stock

from .grouped import GroupedModel, Seq2SeqGroupedAttention, Seq2SeqGroupedConfig


class GroupedT5Config(Seq2SeqGroupedConfig, T5Config):
    """T5's config, plus the KV heads of the encoder, the decoder and the cross-attention."""

    model_type = "gqa_t5"
    kv_fields = dict.fromkeys(Seq2SeqGroupedConfig.kv_fields, "num_heads")

    encoder_kv_heads: int | None = None
    decoder_kv_heads: int | None = None
    cross_kv_heads: int | None = None


class GroupedT5Attention(Seq2SeqGroupedAttention, stock.T5Attention):
    """The relative position bias belongs to the query heads, so it stays as it is."""

    kv_projections = ("k", "v")
    heads_attribute = "n_heads"
    eager = stock.eager_attention_forward


class GroupedT5(GroupedModel):
    config_class = GroupedT5Config
    replaced: ClassVar[dict[type, type]] = {stock.T5Attention: GroupedT5Attention}


class GroupedT5Model(GroupedT5, stock.T5Model): ...


class GroupedT5ForConditionalGeneration(GroupedT5, stock.T5ForConditionalGeneration): ...


class GroupedT5EncoderModel(GroupedT5, stock.T5EncoderModel): ...


class GroupedT5ForSequenceClassification(GroupedT5, stock.T5ForSequenceClassification): ...


class GroupedT5ForTokenClassification(GroupedT5, stock.T5ForTokenClassification): ...


class GroupedT5ForQuestionAnswering(GroupedT5, stock.T5ForQuestionAnswering): ...
