"""bf16 between layers, fp32 weights: which dtype stands where, and what it costs in accuracy."""

from __future__ import annotations

import pytest
import torch
from conformance import assert_conforms
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from hf_attn_patch.training.model.precision import round_between_layers


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=64))


def gradients(model, ids, low: bool) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        logits = model(ids).logits
    torch.nn.functional.cross_entropy(
        logits[0, :-1].to(logits.dtype if not low else torch.float32), ids[0, 1:]
    ).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_the_residual_stream_is_bf16_and_gradients_are_fp32(make):
    model = make()
    round_between_layers(model)
    seen = set()
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            module.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
            module.register_forward_hook(
                lambda _, args, out: seen.add((out[0] if isinstance(out, tuple) else out).dtype)
            )
    grads = gradients(model, torch.randint(0, 512, (1, 32)), low=True)
    assert seen == {torch.bfloat16}
    assert {g.dtype for g in grads.values()} == {torch.float32}
    seen.clear()
    with torch.no_grad():
        model(torch.randint(0, 512, (1, 32)))  # not under autocast: as it was
    assert seen == {torch.float32}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_gradients_are_as_good_as_those_of_a_bf16_model(make):
    """The conformance rule: no worse than twice what a model loaded in bf16 makes, against fp64."""
    ids = torch.randint(0, 512, (1, 48), generator=torch.Generator().manual_seed(1))
    models = {name: make().eval() for name in ("ours", "low", "ref")}
    round_between_layers(models["ours"])
    ours = gradients(models["ours"], ids, low=True)
    low = gradients(models["low"].bfloat16(), ids, low=False)
    ref = gradients(models["ref"].double(), ids, low=False)
    for name, want in ref.items():
        assert_conforms(ours[name], low[name], want, factor=3.0)
