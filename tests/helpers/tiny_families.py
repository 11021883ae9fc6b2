"""Tiny models of every family that conversion supports with stock configs, built from configs alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers

#: model_type -> (class of the model, arguments of its config beside the common ones)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True}),
    "mistral": ("MistralForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 2}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 6}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 4},
    ),
    "gemma": ("GemmaForCausalLM", {"head_dim": 6}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 6, "query_pre_attn_scalar": 6}),
    "gemma3_text": ("Gemma3ForCausalLM", {"head_dim": 6, "query_pre_attn_scalar": 6}),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": 0}),
    "olmo": ("OlmoForCausalLM", {"clip_qkv": 8.0}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", {}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("GraniteForCausalLM", {"attention_multiplier": 0.2}),
    "granitemoe": ("GraniteMoeForCausalLM", {"num_local_experts": 2}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "stablelm": ("StableLmForCausalLM", {"qk_layernorm": True, "use_qkv_bias": True}),
    "cohere": ("CohereForCausalLM", {"use_qk_norm": True}),
    "cohere2": ("Cohere2ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {"pad_token_id": 0, "no_rope_layers": [1, 0]}),
    "glm": ("GlmForCausalLM", {"head_dim": 8, "pad_token_id": 0}),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 8, "pad_token_id": 0}),
    "nemotron": ("NemotronForCausalLM", {}),
    "arcee": ("ArceeForCausalLM", {}),
    "seed_oss": ("SeedOssForCausalLM", {"head_dim": 6}),
    "exaone4": ("Exaone4ForCausalLM", {}),
    "ministral": ("MinistralForCausalLM", {"head_dim": 4}),
    "aria_text": ("AriaTextForCausalLM", {"moe_num_experts": 4, "moe_topk": 2}),
    "apertus": ("ApertusForCausalLM", {"head_dim": 6}),
    "cwm": ("CwmForCausalLM", {"head_dim": 4}),
    "ernie4_5": ("Ernie4_5ForCausalLM", {"head_dim": 6}),
    "exaone_moe": ("ExaoneMoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "flex_olmo": ("FlexOlmoForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}),
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 6}),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "helium": ("HeliumForCausalLM", {"head_dim": 4, "pad_token_id": 0}),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM", {"head_dim": 6}),
    "hyperclovax": ("HyperCLOVAXForCausalLM", {}),
    "jais2": ("Jais2ForCausalLM", {}),
    "minimax_m2": (
        "MiniMaxM2ForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, "rotary_dim": 2},
    ),
    "ministral3": ("Ministral3ForCausalLM", {"head_dim": 4}),
    "phimoe": ("PhimoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}),
    "vaultgemma": ("VaultGemmaForCausalLM", {"head_dim": 6, "query_pre_attn_scalar": 6}),
    "falcon": ("FalconForCausalLM", {"new_decoder_architecture": True, "bias": True}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {"multi_query": False}),
}

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of that family with 8 heads and 2 layers, changed by ``changes``."""
    arguments = {**COMMON, **FAMILIES[model_type][1], **changes}
    if model_type in ("falcon", "gpt_bigcode"):
        kv_heads = arguments.pop("num_key_value_heads")
        if model_type == "falcon":
            arguments.setdefault("num_kv_heads", kv_heads)
            arguments.pop("intermediate_size")
    return transformers.AutoConfig.for_model(model_type, **arguments)


def tiny_model(model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A model of that family whose every parameter is drawn anew, norms and biases too."""
    torch.manual_seed(seed)
    model = getattr(transformers, FAMILIES[model_type][0])(tiny_config(model_type, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return model.to(dtype).eval()
