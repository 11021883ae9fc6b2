"""Families whose layers read the mask themselves (routers, scores of their own, own code beside the interface)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from every_family import config_of, known_here, model_of

import hf_attn_patch
from hf_attn_patch.hf.mask_function import EXTENDS_MASKS, SLICES_MASKS

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


def git() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.GitConfig(**DECODER, vision_config={**vision, "image_size": 16, "patch_size": 8})
    return transformers.GitForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "bigbird_pegasus": bigbird_pegasus, "doge": doge, "git": git, "nllb-moe": nllb_moe,
}  # fmt: skip


def informer() -> tuple[Any, dict[str, Any]]:
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = transformers.InformerConfig(
        **sizes, prediction_length=6, context_length=12, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16,
        lags_sequence=[1, 2], num_time_features=1, distil=False, sampling_factor=2,
    )  # fmt: skip
    past, future = torch.randn(2, 14), torch.randn(2, 6)
    times = {"past_time_features": past[..., None] / 2, "future_time_features": future[..., None] / 2}
    seen = {"past_values": past, "past_observed_mask": torch.ones_like(past), "future_values": future}
    return transformers.InformerForPrediction(config), seen | times


def gemma4_audio() -> tuple[Any, dict[str, Any]]:
    audio = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    config = audio.Gemma4AudioConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, subsampling_conv_channels=[128, 8],
        output_proj_dims=16, conv_kernel_size=3, attention_chunk_size=4, attention_context_left=5,
    )  # fmt: skip
    mask = torch.arange(64) < torch.tensor([[40], [64]])
    return audio.Gemma4AudioModel(config), {"input_features": torch.randn(2, 64, 128), "attention_mask": mask}


def lasr_encoder() -> tuple[Any, dict[str, Any]]:
    config = transformers.AutoConfig.for_model(
        "lasr_encoder", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        num_mel_bins=80, subsampling_conv_channels=8, conv_kernel_size=5,
    )  # fmt: skip
    mask = torch.arange(80) < torch.tensor([[50], [80]])
    return transformers.AutoModel.from_config(config), {
        "input_features": torch.randn(2, 80, 80),
        "attention_mask": mask.long(),
    }


OTHERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "gemma4_audio": gemma4_audio, "informer": informer, "lasr_encoder": lasr_encoder,
}  # fmt: skip


def test_every_such_family_is_tried() -> None:
    assert {*MODELS, *OTHERS, "deepseek_v4"} == EXTENDS_MASKS  # the last one has a file of its own


@pytest.mark.parametrize("name", OTHERS)
def test_forwards_of_models_that_write_no_text(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = OTHERS[name]()
    results = []
    for switch in (lambda: model.eval().set_attn_implementation("eager"), lambda: hf_attn_patch.enable(model)):
        switch()
        torch.manual_seed(1)
        with torch.no_grad():
            outputs = model(**inputs)
        results.append(outputs.params[0] if name == "informer" else outputs.last_hidden_state)
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)


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


def t5gemma2() -> Any:
    text = {
        **DECODER, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "dropout_rate": 0.0,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    encoder = {"text_config": text, "vision_config": {**vision, "image_size": 16, "patch_size": 4}}
    config = transformers.T5Gemma2Config(
        encoder=encoder, decoder=text, pad_token_id=0, eos_token_id=2, decoder_start_token_id=1, initializer_range=0.3
    )
    torch.manual_seed(0)
    return transformers.T5Gemma2ForConditionalGeneration(config).eval()


#: families that hand some rows of the mask on, or work on that of each single token too
WORKING = [name for name in (*sorted(SLICES_MASKS), "qwen4_exp_text") if name in known_here()]
SHARING = {
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("name", [*WORKING, "t5gemma2"])
def test_generation_of_families_that_work_on_masks(name: str, padding: str) -> None:
    changes = SHARING if name in SLICES_MASKS else {}
    model = t5gemma2() if name == "t5gemma2" else model_of(config_of(name, **changes))
    ids = torch.randint(3, 60, (3, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[0, :4] = 0
    if padding == "holes":
        mask[1, 5:8] = 0
    results = []
    for switch in (lambda: model.set_attn_implementation("eager"), lambda: hf_attn_patch.enable(model)):
        switch()
        more = {} if padding == "none" else {"attention_mask": mask}
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
        results.append(torch.stack(model.generate(ids, **more, **options).logits))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


#: families whose layers choose keys by scores of their own, from the mask that they are given
SELECTING = [name for name in ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4") if name in transformers.CONFIG_MAPPING]
LATENT: dict[str, Any] = {
    **DECODER, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "index_topk": 8, "index_n_heads": 2,
    "index_head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("given", ["nothing", "padding", "documents"])
@pytest.mark.parametrize("name", SELECTING)
def test_a_family_that_hands_over_which_keys_is_refused_before_it_reads_a_mask(name: str, given: str) -> None:
    config = transformers.AutoConfig.for_model(name, **LATENT)
    model = transformers.AutoModel.from_config(config, attn_implementation="hf_attn_patch").eval()
    ids = torch.arange(2, 24).view(2, 11)
    of_kinds: dict[str, dict[str, Any]] = {
        "padding": {"attention_mask": (torch.arange(11) > torch.tensor([[3], [-1]])).long()},
        "documents": {"position_ids": torch.cat([torch.arange(5), torch.arange(6)])[None], "use_cache": False},
    }
    with pytest.raises(hf_attn_patch.AttentionError, match="passes 'indices', which selects or weighs keys"):
        model(input_ids=ids, **of_kinds.get(given, {}))
