"""ELECTRA with configurable KV heads."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import ElectraConfig
from transformers.models.electra import modeling_electra as stock

from .grouped import DecoderGroupedConfig, GroupedAttention, GroupedModel


class GroupedElectraConfig(DecoderGroupedConfig, ElectraConfig):
    """ELECTRA's config, plus ``num_key_value_heads`` and, for decoders with cross-attention, ``cross_kv_heads``."""

    model_type = "gqa_electra"

    num_key_value_heads: int | None = None
    cross_kv_heads: int | None = None


class GroupedElectraSelfAttention(GroupedAttention, stock.ElectraSelfAttention):
    kv_projections = ("key", "value")
    heads_attribute = "num_attention_heads"
    eager = stock.eager_attention_forward


class GroupedElectraCrossAttention(GroupedAttention, stock.ElectraCrossAttention):
    kv_projections = ("key", "value")
    heads_attribute = "num_attention_heads"
    eager = stock.eager_attention_forward

    def kv_heads(self, config: Any) -> int:
        return int(config.cross_kv_heads)


class GroupedElectra(GroupedModel):
    config_class = GroupedElectraConfig
    replaced: ClassVar[dict[type, type]] = {
        stock.ElectraSelfAttention: GroupedElectraSelfAttention,
        stock.ElectraCrossAttention: GroupedElectraCrossAttention,
    }


class GroupedElectraModel(GroupedElectra, stock.ElectraModel): ...


class GroupedElectraForCausalLM(GroupedElectra, stock.ElectraForCausalLM): ...


class GroupedElectraForMaskedLM(GroupedElectra, stock.ElectraForMaskedLM): ...


class GroupedElectraForSequenceClassification(GroupedElectra, stock.ElectraForSequenceClassification): ...


class GroupedElectraForMultipleChoice(GroupedElectra, stock.ElectraForMultipleChoice): ...


class GroupedElectraForTokenClassification(GroupedElectra, stock.ElectraForTokenClassification): ...


class GroupedElectraForQuestionAnswering(GroupedElectra, stock.ElectraForQuestionAnswering): ...


class GroupedElectraForPreTraining(GroupedElectra, stock.ElectraForPreTraining): ...
