"""Tiny models of the kinds that decode differently, and the recorded steps that their caches have."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import hf_attn_patch
from hf_attn_patch.decoding.recorded_forward import state_of

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 4096,
}
HYBRID = {"head_dim": 16, "sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **HYBRID)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **HYBRID)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=48)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=64, n_layer=3, n_head=4, initializer_range=0.3, eos_token_id=None)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=128,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            init_std=0.3,
            forced_eos_token_id=None,
            eos_token_id=None,
        )
    ),
}


def build(family: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    """With our attention alone: what tests switch on they switch on by themselves."""
    return hf_attn_patch.enable(FAMILIES[family]().to(device, dtype).eval(), cache=None, cuda_graphs=False)


def batch(device: str, rows: int = 4, length: int = 37, padded: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 128, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded and rows > 1:
        mask[1, :20], mask[rows - 1, :5] = 0, 0
    return {"input_ids": ids.where(mask == 1, 0).to(device), "attention_mask": mask.to(device)}


def generate(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 60, **kwargs})


def recorded(model: Any) -> int:
    """How many recordings the model's living caches have."""
    steps = [step for each in state_of(model).caches.values() for step in each.known.values()]
    return sum(step.recording is not None for step in steps)
