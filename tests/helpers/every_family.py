"""Tiny models of the families that ``decoder_rows.py`` describes, built from configs alone."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
import transformers
from packaging.version import Version
from tiny_families import COMMON

MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_MOE: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


BY_TYPE: dict[str, Any] = {
    **SLIDING,
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
    },
}


def mrope(*sections: int, **more: Any) -> dict[str, Any]:
    """RoPE by several position ids: how many of the rotary planes turn by each."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **more}}


GEMMA: dict[str, Any] = {"head_dim": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, **SLIDING}

#: model_type -> arguments of its config beside the common ones
EVERY: dict[str, dict[str, Any]] = {
    "afmoe": {**MOE, "num_shared_experts": 1, "num_dense_layers": 1, "head_dim": 4, **SLIDING},
    "apertus1p5_text": {"head_dim": 6},
    "bamba": {"attn_layer_indices": [1], **MAMBA2},
    "beam": {**MOE, "head_dim": 4, **SLIDING},
    "bitnet": {},
    "cohere2_moe": {**MOE, "head_dim": 4, **SLIDING},
    "cohere_compass_text": {"pad_token_id": 0, **BY_TYPE},
    "cosmos3_edge_text": {"head_dim": 8, **mrope(2, 1, 1)},
    "dbrx": {
        "d_model": 32, "n_heads": 8, "n_layers": 2, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 8, "rope_theta": 10000.0, "clip_qkv": 100.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2},
    },
    "deepseek_ocr2_text": {**ROUTED_MOE, "mlp_layer_types": ["dense", "sparse"]},
    "diffllama": {},
    "diffusion_gemma_text": {
        "head_dim": 4, "global_head_dim": 8, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
        **SLIDING,
    },
    "dory": {"head_dim": 4},
    "dots1": {**ROUTED_MOE, "head_dim": 4},
    "emu3_text_model": {"pad_token_id": 0},
    "ernie4_5_vl_moe_text": {
        "hidden_size": 64, **mrope(1, 1, 2), "moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": [16, 16],
        "moe_num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "exaone": {},
    "evolla": {
        "aligner_num_add_layers": 1, "pad_token_id": 0, "resampler_depth": 1, "resampler_dim_head": 4,
        "resampler_heads": 2, "resampler_num_latents": 4,
        "protein_encoder_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 16,
            "pad_token_id": 0, "mask_token_id": 1,
        },
    },
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64},
    "flint": {**MOE, "head_dim": 4, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0], **SLIDING},
    "gemma3n_text": {
        **GEMMA, "num_kv_shared_layers": 1, "num_hidden_layers": 3, "laurel_rank": 4, "altup_num_inputs": 2,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "intermediate_size": [48, 48, 48],
        "activation_sparsity_pattern": [0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        **GEMMA, "global_head_dim": 8, "num_kv_shared_layers": 1, "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    },
    "gemma4_unified_text": {"head_dim": 4, "global_head_dim": 8, **SLIDING},
    "glm4_moe": {**ROUTED_MOE, "head_dim": 8, "use_qk_norm": True},
    "glm4v_moe_text": {**ROUTED_MOE, "head_dim": 8, **mrope(1, 1, 0, partial_rotary_factor=0.5)},
    "glm4v_text": {"pad_token_id": 0, **mrope(1, 1, 0)},
    "glm_image_text": {"pad_token_id": 0, **mrope(1, 1, 0)},
    "glm_ocr_text": {"pad_token_id": 0, **mrope(1, 1, 0)},
    "granite4_vision_text": {},
    "granite_docling_text": {"pad_token_id": 0},
    "granite_swa": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], **LOCAL_MOE, "shared_intermediate_size": 32,
        "position_embedding_type": "rope", **MAMBA2,
    },
    "hunyuan_v1_moe": {"num_experts": 2, "moe_topk": 1, "head_dim": 4},
    "hunyuan_vl_text": {"head_dim": 8, "pad_token_id": 0, **mrope(2, 1, 1, 0)},
    "hy_v3": {**MOE, "head_dim": 4},
    "internlm3": {"head_dim": 4},
    "iquestcoder": {"head_dim": 4},
    "jamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4,
        "mamba_dt_rank": 4, "use_mamba_kernels": False, "pad_token_id": 0,
    },
    "kolibri1": {**MOE, "num_local_experts": 4, "head_dim": 4, **SLIDING},
    "laguna": {**MOE, "head_dim": 4, "num_attention_heads_per_layer": [16, 8], **SLIDING},
    "lara_mini": {
        **MOE, "head_dim": 4, "num_hidden_layers": 3, **DELTA,
        "layer_types": ["linear_attention", "sliding_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], **MOE},
    "lfm3": {"layer_types": ["conv", "full_attention"], **MOE, "head_dim": 4, "pad_token_id": 0},
    "llama4_text": {
        **LOCAL_MOE, "num_experts_per_tok": 1, "head_dim": 4, "intermediate_size_mlp": 32, "pad_token_id": 0,
        "no_rope_layers": [1, 0],
    },
    "mellum": {**MOE, "head_dim": 4, **SLIDING},
    "mimo_v2_flash": {
        **ROUTED_MOE, "head_dim": 6, "v_head_dim": 4, "num_attention_heads": 16, "num_key_value_heads": 8, **SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.667}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "mllama_text_model": {
        "num_hidden_layers": 3, "cross_attention_layers": [1], "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "minimax": {**LOCAL_MOE, "head_dim": 4, "layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    "molmo2_text": {"head_dim": 4},
    "moshi": {"ffn_dim": 64},
    "muse_glimmer_text": {"head_dim": 4},
    "muse_spark_text": {"head_dim": 4, **LOCAL_MOE, "moe_intermediate_size": 16, "moe_hidden_size": 32},
    "nanochat": {},
    "nemotron_h": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"], "head_dim": 4, "mamba_num_heads": 4,
        "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8,
    },
    "olmo_hybrid": {**DELTA, "pad_token_id": 0},
    "paddleocr_vl_text": {"head_dim": 4, **mrope(1, 1, 0), "pad_token_id": 0},
    "phi4_multimodal": {
        "pad_token_id": 0,
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14, "crop_size": 28,
        },
        "audio_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "input_size": 16,
            "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 16,
        },
    },
    "qwen2_5_omni_text": mrope(1, 1, 0),
    "qwen3_5_moe_text": {**MOE, "head_dim": 8, "shared_expert_intermediate_size": 16, **DELTA},
    "qwen3_5_text": {"head_dim": 8, **DELTA},
    "qwen3_next": {**MOE, "head_dim": 8, "shared_expert_intermediate_size": 16, **DELTA},
    "qwen3_omni_moe_text": {**MOE, **mrope(1, 1, 0), "head_dim": 4},
    "qwen3_vl_moe_text": {**MOE, "head_dim": 4, **mrope(1, 1, 0)},
    "qwen4_exp_text": {
        **MOE, "head_dim": 8, "shared_expert_intermediate_size": 16, **DELTA, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 16},
    "sarvam_moe": {**ROUTED_MOE, "head_dim": 4},
    "step3p5": {
        "head_dim": 4, **SLIDING, "num_sliding_attention_heads": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "share_expert_dim": 16,
    },
    "unlimited_ocr_text": {**ROUTED_MOE},
    "voxtral_realtime_text": {"head_dim": 4},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 8,
        "n_mamba_heads": 2, "use_mamba_kernels": False, "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "mamba_ngroups": 1,
        "n_mamba_heads": 4, "num_mem_blocks": 1, "chunk_size": 8, "use_mem_rope": True, "adapter_rank": 4,
        "use_shared_attention_adapter": False,
    },
}  # fmt: skip


#: their classes read other configs before this version
SINCE = {"cohere_compass_text": "5.23", "paddleocr_vl_text": "5.23"}


def known_here() -> list[str]:
    """Those that the installed transformers has."""
    here = Version(transformers.__version__)
    return [n for n in EVERY if n in transformers.CONFIG_MAPPING and here >= Version(SINCE.get(n, "5.17"))]


def config_of(model_type: str, **changes: Any) -> Any:
    """A tiny config of that family, changed by ``changes``."""
    arguments = {**COMMON, **EVERY[model_type], **changes}
    return transformers.CONFIG_MAPPING[model_type](**arguments)


def class_of(config: Any) -> Any:
    """The causal language model of a config, or else the text model alone."""
    for auto_class in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        with contextlib.suppress(KeyError, ValueError):  # a name in the table whose class is not exported
            return auto_class[type(config)]
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, transformers.PreTrainedModel)
        and getattr(value, "config_class", None) is type(config)
        and not value.__name__.endswith("PreTrainedModel")
    ]
    return max(found, key=lambda value: "ForCausalLM" in value.__name__)


def model_of(config: Any, seed: int = 0) -> Any:
    """A model of that config whose every parameter is drawn anew, norms and biases too."""
    torch.manual_seed(seed)
    model = class_of(config)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return model.eval()


def with_kv_heads(model_type: str, number: int) -> Any:
    """A config with that many KV heads, written here: what a row's field writes is not asked."""
    if model_type == "dbrx":
        inner = {**EVERY["dbrx"]["attn_config"], "kv_n_heads": number}
        return config_of(model_type, attn_config=inner)
    return config_of(model_type, num_key_value_heads=number)


def least(model_type: str) -> int:
    return 2 if model_type == "diffllama" else 1


def repeated(small: Any, big: Any) -> None:
    """Fill a model that has more KV heads with those of ``small``, each as often as it takes.

    Nothing of the conversion is used: tensors are told by their shapes, heads by how many there are.
    """
    state = dict(small.named_parameters())
    with torch.no_grad():
        for name, parameter in big.named_parameters():
            old = state[name]
            if old.shape == parameter.shape:
                parameter.copy_(old)
                continue
            fused = {"Wqkv": True, "qkv_proj": True, "att_proj": True}.get(name.split(".")[-2], False)
            kept = fused_queries(small, parameter, old) if fused else 0
            times = (len(parameter) - kept) // (len(old) - kept)
            size = head_size(small, name, fused, old)
            heads = old[kept:].unflatten(0, (-1, size))
            parameter.copy_(torch.cat([old[:kept], heads.repeat_interleave(times, 0).flatten(0, 1)]))


def fused_queries(small: Any, parameter: torch.Tensor, old: torch.Tensor) -> int:
    """Rows of q before those of k and v: 8 heads."""
    heads = small.config.get_text_config().num_attention_heads
    return heads * head_size(small, "", True, old)


def head_size(small: Any, name: str, fused: bool, old: torch.Tensor) -> int:
    """D of a K or V projection whose model has two KV heads (MiMo's sliding layers four)."""
    if fused:
        config = small.config.get_text_config()
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    number = 4 if small.config.model_type == "mimo_v2_flash" and ".0." in name else 2
    return len(old) // number
