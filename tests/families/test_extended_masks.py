"""A family whose layers extend their masks by compressed keys: DeepSeek-V4, against eager."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_attn_patch import AttentionError
from hf_attn_patch.hf.attention_function import attention_forward
from hf_attn_patch.hf.mask_function import build_mask

deepseek_v4 = pytest.importorskip("transformers.models.deepseek_v4")
LAYERS = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = deepseek_v4.DeepseekV4Config(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        q_lora_rank=16,
        num_experts_per_tok=2,
        n_routed_experts=4,
        layer_types=LAYERS,
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        mlp_layer_types=["moe"] * 3,
        sliding_window=4,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=2,
        max_position_embeddings=128,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def both(model, function):
    results = []
    for name in ("eager", "hf_attn_patch"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            results.append(function(model))
    return results


@pytest.mark.parametrize("padded", [False, True])
def test_forward(model, padded: bool) -> None:
    ids = torch.randint(0, 64, (2, 19), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :6] = 0
    eager, ours = both(model, lambda m: m(ids, attention_mask=mask).logits)
    torch.testing.assert_close(ours[mask.bool()], eager[mask.bool()], atol=2e-5, rtol=1e-4)


def test_the_compressed_keys_count(model) -> None:
    """What the comparison would miss if masks were not extended: tokens beyond the window change the last one."""
    ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[:, :8] = (other[:, :8] + 1) % 64
    model.set_attn_implementation("hf_attn_patch")
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits[:, -1], model(other).logits[:, -1], atol=1e-4)


def test_generation(model) -> None:
    ids = torch.randint(0, 64, (1, 11), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    scores = {"output_logits": True, "return_dict_in_generate": True}
    eager, ours = both(model, lambda m: m.generate(ids, **options, **scores))
    assert torch.equal(ours.sequences, eager.sequences)
    for mine, theirs in zip(ours.logits, eager.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_a_carrier_that_was_changed_is_refused_with_the_way_out() -> None:
    q = torch.randn(1, 2, 3, 8)
    module = torch.nn.Module()
    with pytest.raises(AttentionError, match=r'if the model changes the masks .* attn_implementation="eager"'):
        attention_forward(module, q, q, q, torch.zeros(1, 1, 3, 5, dtype=torch.int32))
    padding = torch.tensor([[False, True, True, True, False, True]])
    carrier = build_mask(1, 6, 6, attention_mask=padding)
    assert carrier is not None
    with pytest.raises(AttentionError, match="if the model changes the masks"):
        attention_forward(module, q, q, q, carrier[:, :, -3:])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_more_keys_than_there_are_is_refused(dtype: torch.dtype) -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(AttentionError, match="mask of 5 keys reached a layer that has 3: layers with a window"):
        attention_forward(torch.nn.Module(), q, q, q, torch.ones(1, 1, 3, 5, dtype=dtype))


def test_a_layer_may_cut_its_mask_to_its_keys() -> None:
    """As Pix2Struct does, whose prompts may have two tokens."""
    q, module = torch.randn(2, 2, 2, 8), torch.nn.Module()
    mask = build_mask(2, 2, 2, attention_mask=torch.tensor([[False, True], [True, True]]))
    assert mask is not None
    expected, _ = attention_forward(module, q, q, q, mask)
    found, _ = attention_forward(module, q, q, q, mask[:, :, :, :2])
    torch.testing.assert_close(found[0, 1], expected[0, 1])
    torch.testing.assert_close(found[1], expected[1])
