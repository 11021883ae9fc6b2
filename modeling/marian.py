"""Marian with configurable KV heads."""

from __future__ import annotations

from typing import ClassVar

from transformers import MarianConfig
from transformers.models.marian import modeling_marian as stock

from .grouped import GroupedModel, Seq2SeqGroupedAttention, Seq2SeqGroupedConfig


class GroupedMarianConfig(Seq2SeqGroupedConfig, MarianConfig):
    """Marian's config, plus the KV heads of the encoder, the decoder and the cross-attention."""

    model_type = "gqa_marian"

    encoder_kv_heads: int | None = None
    decoder_kv_heads: int | None = None
    cross_kv_heads: int | None = None


class GroupedMarianAttention(Seq2SeqGroupedAttention, stock.MarianAttention):
    eager = stock.eager_attention_forward


class GroupedMarian(GroupedModel):
    config_class = GroupedMarianConfig
    replaced: ClassVar[dict[type, type]] = {stock.MarianAttention: GroupedMarianAttention}


class GroupedMarianModel(GroupedMarian, stock.MarianModel): ...


class GroupedMarianMTModel(GroupedMarian, stock.MarianMTModel): ...


class GroupedMarianForCausalLM(GroupedMarian, stock.MarianForCausalLM): ...
