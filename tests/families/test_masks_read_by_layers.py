"""Families whose layers read the mask themselves (routers, scores of their own, own code beside the interface)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import hf_attn_patch
from hf_attn_patch.hf.mask_function import EXTENDS_MASKS

SIZES: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SEQ2SEQ = {
    **SIZES, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "dropout": 0.0,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1,
}  # fmt: skip


def doge() -> Any:
    config = transformers.DogeConfig(**DECODER, num_key_value_heads=2, keep_window_size=6)
    return transformers.DogeForCausalLM(config)


def nllb_moe() -> Any:
    experts = {"num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 64}
    return transformers.NllbMoeForConditionalGeneration(transformers.NllbMoeConfig(**SEQ2SEQ, **experts))


def bigbird_pegasus() -> Any:
    config = transformers.BigBirdPegasusConfig(**SEQ2SEQ, attention_type="original_full")
    return transformers.BigBirdPegasusForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {"bigbird_pegasus": bigbird_pegasus, "doge": doge, "nllb-moe": nllb_moe}


def test_every_such_family_is_tried() -> None:
    assert set(MODELS) | {"deepseek_v4"} == EXTENDS_MASKS  # that one has a file of its own


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_generation_are_eagers(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    assert model.config.get_text_config().model_type == name
    ids = torch.randint(3, 64, (3, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    inputs = {"input_ids": torch.where(mask == 1, ids, 0), "attention_mask": mask}
    decoder = {"decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {}
    seen = slice(None) if decoder else mask == 1
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    results = []
    for switch in (lambda: model.set_attn_implementation("eager"), lambda: hf_attn_patch.enable(model)):
        switch()
        with torch.no_grad():
            results.append((model(**inputs, **decoder).logits[seen], model.generate(**inputs, **options)))
    (eager, words), (ours, our_words) = results
    torch.testing.assert_close(ours, eager, atol=2e-5, rtol=1e-4)
    assert torch.equal(our_words, words)
