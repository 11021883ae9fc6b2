"""DistilBERT with configurable KV heads."""

from __future__ import annotations

from typing import ClassVar

from transformers import DistilBertConfig
from transformers.models.distilbert import modeling_distilbert as stock

from .grouped import GroupedAttention, GroupedConfig, GroupedModel


class GroupedDistilBertConfig(GroupedConfig, DistilBertConfig):
    """DistilBERT's config, plus ``num_key_value_heads``."""

    model_type = "gqa_distilbert"

    num_key_value_heads: int | None = None


class GroupedDistilBertSelfAttention(GroupedAttention, stock.DistilBertSelfAttention):
    kv_projections = ("k_lin", "v_lin")
    heads_attribute = "n_heads"
    eager = stock.eager_attention_forward


class GroupedDistilBert(GroupedModel):
    config_class = GroupedDistilBertConfig
    replaced: ClassVar[dict[type, type]] = {stock.DistilBertSelfAttention: GroupedDistilBertSelfAttention}


class GroupedDistilBertModel(GroupedDistilBert, stock.DistilBertModel): ...


class GroupedDistilBertForMaskedLM(GroupedDistilBert, stock.DistilBertForMaskedLM): ...


class GroupedDistilBertForSequenceClassification(GroupedDistilBert, stock.DistilBertForSequenceClassification): ...


class GroupedDistilBertForMultipleChoice(GroupedDistilBert, stock.DistilBertForMultipleChoice): ...


class GroupedDistilBertForTokenClassification(GroupedDistilBert, stock.DistilBertForTokenClassification): ...


class GroupedDistilBertForQuestionAnswering(GroupedDistilBert, stock.DistilBertForQuestionAnswering): ...
