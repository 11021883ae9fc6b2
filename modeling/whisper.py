"""Whisper with configurable KV heads."""

from __future__ import annotations

from typing import ClassVar

from transformers import WhisperConfig
from transformers.models.whisper import modeling_whisper as stock

from .grouped import GroupedModel, KVGrouping, Seq2SeqGroupedAttention, Seq2SeqGroupedConfig


class GroupedWhisperConfig(Seq2SeqGroupedConfig, WhisperConfig):
    """Whisper's config, plus the KV heads of the encoder, the decoder and the cross-attention.

    The stock config keeps ``num_key_value_heads`` as another name for the encoder's query heads: leave it alone.
    """

    model_type = "gqa_whisper"

    encoder_kv_heads: int | None = None
    decoder_kv_heads: int | None = None
    cross_kv_heads: int | None = None


class GroupedWhisperAttention(Seq2SeqGroupedAttention, stock.WhisperAttention):
    eager = stock.eager_attention_forward

    def narrow(self, groups: KVGrouping) -> None:
        super().narrow(groups)
        self.num_heads = groups.num_kv_heads  # the stock forward reads it only to shape K and V


class GroupedWhisper(GroupedModel):
    config_class = GroupedWhisperConfig
    replaced: ClassVar[dict[type, type]] = {stock.WhisperAttention: GroupedWhisperAttention}


class GroupedWhisperModel(GroupedWhisper, stock.WhisperModel): ...


class GroupedWhisperForConditionalGeneration(GroupedWhisper, stock.WhisperForConditionalGeneration): ...


class GroupedWhisperForCausalLM(GroupedWhisper, stock.WhisperForCausalLM): ...


class GroupedWhisperForAudioClassification(GroupedWhisper, stock.WhisperForAudioClassification): ...
