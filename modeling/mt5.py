"""mT5 with configurable KV heads."""

from __future__ import annotations

from typing import ClassVar

from transformers import MT5Config
from transformers.models.mt5 import modeling_mt5 as stock

from .grouped import GroupedModel, Seq2SeqGroupedAttention, Seq2SeqGroupedConfig


class GroupedMT5Config(Seq2SeqGroupedConfig, MT5Config):
    """mT5's config, plus the KV heads of the encoder, the decoder and the cross-attention."""

    model_type = "gqa_mt5"
    kv_fields = dict.fromkeys(Seq2SeqGroupedConfig.kv_fields, "num_heads")

    encoder_kv_heads: int | None = None
    decoder_kv_heads: int | None = None
    cross_kv_heads: int | None = None


class GroupedMT5Attention(Seq2SeqGroupedAttention, stock.MT5Attention):
    """The relative position bias belongs to the query heads, so it stays as it is."""

    kv_projections = ("k", "v")
    heads_attribute = "n_heads"
    eager = stock.eager_attention_forward


class GroupedMT5(GroupedModel):
    config_class = GroupedMT5Config
    replaced: ClassVar[dict[type, type]] = {stock.MT5Attention: GroupedMT5Attention}


class GroupedMT5Model(GroupedMT5, stock.MT5Model): ...


class GroupedMT5ForConditionalGeneration(GroupedMT5, stock.MT5ForConditionalGeneration): ...


class GroupedMT5EncoderModel(GroupedMT5, stock.MT5EncoderModel): ...


class GroupedMT5ForSequenceClassification(GroupedMT5, stock.MT5ForSequenceClassification): ...


class GroupedMT5ForTokenClassification(GroupedMT5, stock.MT5ForTokenClassification): ...


class GroupedMT5ForQuestionAnswering(GroupedMT5, stock.MT5ForQuestionAnswering): ...
