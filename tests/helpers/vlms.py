"""Configs of tiny vision-language models."""

from __future__ import annotations

from typing import Any

from tiny_families import COMMON

TEXT = {**COMMON, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
VLMS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **COMMON},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
    },
    "qwen2_vl": {
        "text_config": TEXT,
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8},
    },
    "gemma3": {
        "text_config": {**COMMON, "head_dim": 6},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
    },
    "idefics3": {
        "text_config": {"model_type": "llama", **COMMON},
        "vision_config": {"model_type": "idefics3_vision", **VISION},
    },
}
