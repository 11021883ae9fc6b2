"""BioGPT with configurable KV heads."""

from __future__ import annotations

from typing import ClassVar

from transformers import BioGptConfig
from transformers.models.biogpt import modeling_biogpt as stock

from .grouped import GroupedAttention, GroupedConfig, GroupedModel


class GroupedBioGptConfig(GroupedConfig, BioGptConfig):
    """BioGPT's config, plus ``num_key_value_heads``."""

    model_type = "gqa_biogpt"

    num_key_value_heads: int | None = None


class GroupedBioGptAttention(GroupedAttention, stock.BioGptAttention):
    """``k_proj`` and ``v_proj`` are narrower; the stock forward reads the number of heads from their width."""

    eager = stock.eager_attention_forward


class GroupedBioGpt(GroupedModel):
    config_class = GroupedBioGptConfig
    replaced: ClassVar[dict[type, type]] = {stock.BioGptAttention: GroupedBioGptAttention}


class GroupedBioGptModel(GroupedBioGpt, stock.BioGptModel): ...


class GroupedBioGptForCausalLM(GroupedBioGpt, stock.BioGptForCausalLM): ...


class GroupedBioGptForTokenClassification(GroupedBioGpt, stock.BioGptForTokenClassification): ...


class GroupedBioGptForSequenceClassification(GroupedBioGpt, stock.BioGptForSequenceClassification): ...
