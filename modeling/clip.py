"""CLIP with configurable KV heads, for its text and its vision tower each."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip import modeling_clip as stock

from .grouped import GroupedAttention, GroupedConfig, GroupedModel, share_checkpoint_names


class GroupedCLIPTextConfig(GroupedConfig, CLIPTextConfig):
    """CLIP's text config, plus ``num_key_value_heads``."""

    model_type = "gqa_clip_text_model"

    num_key_value_heads: int | None = None


class GroupedCLIPVisionConfig(GroupedConfig, CLIPVisionConfig):
    """CLIP's vision config, plus ``num_key_value_heads``."""

    model_type = "gqa_clip_vision_model"

    num_key_value_heads: int | None = None


PARTS: dict[str, type] = {"vision_config": GroupedCLIPVisionConfig, "text_config": GroupedCLIPTextConfig}


class GroupedCLIPConfig(CLIPConfig):
    """CLIP's config; ``text_config`` and ``vision_config`` each have their ``num_key_value_heads``."""

    model_type = "gqa_clip"
    sub_configs: ClassVar[dict[str, type]] = PARTS
    # newer releases have a description of each part beside its class
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        name: type(spec)(config_class=PARTS[name])
        for name, spec in getattr(CLIPConfig, "sub_configs_defaults", {}).items()
    }


class GroupedCLIPAttention(GroupedAttention, stock.CLIPAttention):
    eager = stock.eager_attention_forward


class GroupedCLIP(GroupedModel):
    config_class = GroupedCLIPConfig
    replaced: ClassVar[dict[type, type]] = {stock.CLIPAttention: GroupedCLIPAttention}


class GroupedCLIPTextModel(GroupedCLIP, stock.CLIPTextModel):
    config_class = GroupedCLIPTextConfig


class GroupedCLIPTextModelWithProjection(GroupedCLIP, stock.CLIPTextModelWithProjection):
    config_class = GroupedCLIPTextConfig


class GroupedCLIPVisionModel(GroupedCLIP, stock.CLIPVisionModel):
    config_class = GroupedCLIPVisionConfig


class GroupedCLIPVisionModelWithProjection(GroupedCLIP, stock.CLIPVisionModelWithProjection):
    config_class = GroupedCLIPVisionConfig


class GroupedCLIPModel(GroupedCLIP, stock.CLIPModel): ...


class GroupedCLIPForImageClassification(GroupedCLIP, stock.CLIPForImageClassification): ...


share_checkpoint_names(GroupedCLIPTextModel, GroupedCLIPVisionModel)
