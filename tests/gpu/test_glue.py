"""Synchronisations, CUDA graphs and compiled generation on a real GPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_attn_patch

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=6,
        intermediate_size=256,
        vocab_size=512,
        attn_implementation="hf_attn_patch",
    )
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


def syncs(function) -> int:
    """How often ``function`` waits for the device."""
    function()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def batch(model, padding: bool):
    ids = torch.randint(0, 512, (4, 96), device="cuda")
    mask = torch.ones_like(ids)
    if padding:
        mask[1, :30], mask[2, :7] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_one_synchronisation_a_forward_at_most(model):
    for padding in (False, True):
        inputs = batch(model, padding)
        assert syncs(lambda: model(**inputs, use_cache=False)) <= 1  # noqa: B023
        cache = model(**inputs, use_cache=True).past_key_values
        step = {
            "input_ids": inputs["input_ids"][:, :1],
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
        }

        def decode():
            model(**step, past_key_values=cache)  # noqa: B023
            cache.crop(-1)  # noqa: B023

        assert syncs(decode) == 0


@torch.no_grad()
def test_generation_agrees_with_eager(model):
    inputs = batch(model, True)
    tokens = {}
    wide = model.float()
    for name in ("eager", "hf_attn_patch"):
        wide.set_attn_implementation(name)
        for cache in (None, "static"):
            tokens[name, cache] = wide.generate(
                **inputs, max_new_tokens=12, do_sample=False, cache_implementation=cache, pad_token_id=0
            )
    model.to(torch.bfloat16)
    for key, value in tokens.items():
        assert torch.equal(value, tokens["eager", None]), key


@torch.no_grad()
def test_cuda_graph_of_a_decode_step(model):
    q = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 2, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mask = torch.rand(2, 1, 1, 512, device="cuda") < 0.8
    expected = hf_attn_patch.attention(q, k, v, mask=mask)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        hf_attn_patch.attention(q, k, v, mask=mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = hf_attn_patch.attention(q, k, v, mask=mask)
    graph.replay()
    assert torch.equal(out, expected)


def test_training_step_with_padding_matches_eager(model):
    inputs = batch(model, True)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    losses = {}
    for name in ("eager", "hf_attn_patch"):
        model.set_attn_implementation(name)
        model.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        losses[name] = (loss.item(), model.model.layers[0].self_attn.k_proj.weight.grad.float().norm().item())
    model.zero_grad(set_to_none=True)
    assert losses["eager"] == pytest.approx(losses["hf_attn_patch"], rel=2e-2)
