"""A model spread over two GPUs: masks that were copied from device to device still say the same."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_attn_patch  # noqa: F401 - registers the implementation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@torch.no_grad()
def test_device_map_over_two_gpus():
    from accelerate import dispatch_model

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=4,
        intermediate_size=256,
        vocab_size=512,
        attn_implementation="hf_attn_patch",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to("cuda:0").eval()
    ids = torch.randint(0, 512, (3, 64), device="cuda:0")
    mask = torch.ones_like(ids)
    mask[1, :20], mask[2, :5] = 0, 0
    holes = mask.clone()
    holes[0, 10] = 0
    positions = torch.cat([torch.arange(30), torch.arange(34)])[None].to("cuda:0")
    calls = [
        {"attention_mask": mask},
        {"attention_mask": holes},
        {"position_ids": positions},
        {"position_ids": positions, "attention_mask": torch.ones_like(ids)},
    ]
    expected = [model(ids, **call).logits for call in calls]
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{i}": i // 2 for i in range(4)}
    model = dispatch_model(model, places)
    for call, reference in zip(calls, expected, strict=True):
        rows = call.get("attention_mask", torch.ones_like(ids)).bool()
        found = model(ids, **call).logits.to("cuda:0")
        torch.testing.assert_close(found[rows], reference[rows], atol=1e-4, rtol=1e-4)
    again = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(again, tokens)
