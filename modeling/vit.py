"""ViT with configurable KV heads."""

from __future__ import annotations

from typing import ClassVar

from transformers import ViTConfig
from transformers.models.vit import modeling_vit as stock

from .grouped import GroupedAttention, GroupedConfig, GroupedModel, share_checkpoint_names


class GroupedViTConfig(GroupedConfig, ViTConfig):
    """ViT's config, plus ``num_key_value_heads``."""

    model_type = "gqa_vit"

    num_key_value_heads: int | None = None


class GroupedViTAttention(GroupedAttention, stock.ViTAttention):
    heads_attribute = "num_attention_heads"
    eager = stock.eager_attention_forward


class GroupedViT(GroupedModel):
    config_class = GroupedViTConfig
    replaced: ClassVar[dict[type, type]] = {stock.ViTAttention: GroupedViTAttention}


class GroupedViTModel(GroupedViT, stock.ViTModel): ...


class GroupedViTForMaskedImageModeling(GroupedViT, stock.ViTForMaskedImageModeling): ...


class GroupedViTForImageClassification(GroupedViT, stock.ViTForImageClassification): ...


share_checkpoint_names(GroupedViTModel, GroupedViTForMaskedImageModeling, GroupedViTForImageClassification)
