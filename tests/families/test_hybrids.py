"""Models with attention in some layers only (state spaces, linear attention or convolutions in the others)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import hf_attn_patch

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
}  # fmt: skip
HYBRIDS: dict[str, dict[str, Any]] = {
    "Jamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "Bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1], **MAMBA2},
    "Zamba2": {
        "num_hidden_layers": 4, "num_key_value_heads": 4, "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "num_mem_blocks": 1, "chunk_size": 8,
        "use_mem_rope": True, "adapter_rank": 4,
    },
    "FalconH1": {**MAMBA2, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "GraniteMoeHybrid": {
        "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
        "shared_intermediate_size": 32, "position_embedding_type": "rope", **MAMBA2,
    },
    "Qwen3Next": {
        "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip


@pytest.fixture(scope="module", params=HYBRIDS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**{**BASE, **HYBRIDS[request.param]})
    return getattr(transformers, f"{request.param}ForCausalLM")(config).eval()


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (3, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :2] = 0, 0
    return {"input_ids": torch.where(mask == 1, ids, 0), "attention_mask": mask}


def test_forward_and_gradients_are_eagers(model: Any) -> None:
    batch = inputs()
    seen = batch["attention_mask"] == 1
    found = []
    for switch in (lambda: model.set_attn_implementation("eager"), lambda: hf_attn_patch.enable(model)):
        switch()
        model.zero_grad()
        logits = model(**batch, use_cache=False).logits[seen]
        logits.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), gradients))
    (eager, their_gradients), (ours, gradients) = found
    torch.testing.assert_close(ours, eager, atol=2e-5, rtol=1e-4)
    assert any("k_proj" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("cache", ["own", "growing"])
def test_generation_is_eagers(model: Any, cache: str) -> None:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    model.set_attn_implementation("eager")
    want = model.generate(**inputs(), **options)
    hf_attn_patch.enable(model)
    own = hf_attn_patch.GrowingCache(config=model.config) if cache == "growing" else None
    assert torch.equal(model.generate(**inputs(), **options, past_key_values=own), want)


def test_packed_rows_are_refused(model: Any) -> None:
    """The other layers would mix neighbouring documents."""
    hf_attn_patch.enable(model)
    with pytest.raises(ValueError, match=r"packed"), torch.no_grad(), hf_attn_patch.unpadded(model):
        model(**inputs())
