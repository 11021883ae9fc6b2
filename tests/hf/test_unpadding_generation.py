"""unpadded() while a cache is filled: generate, and what is left in the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from padded import CAUSAL, batch, build

from hf_attn_patch import unpadded


@pytest.mark.parametrize("attention", ["hf_attn_patch", "sdpa"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}]
)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_generate(family: str, options: dict[str, Any], attention: str) -> None:
    """The prompt runs packed where borders can be given, into a cache that looks as if it had not."""
    model, inputs, widths = build(*CAUSAL[family], attention), batch("left", labels=False), []
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    if family == "opt" and attention == "sdpa":
        pytest.skip("refused: OPT makes its mask without position_ids")
    expected = model.generate(**inputs, **options)
    with unpadded(model):
        embedding = model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda m, args, out: widths.append(tuple(out.shape[:2])))
        torch.testing.assert_close(model.generate(**inputs, **options), expected)
        hook.remove()
    if attention == "hf_attn_patch" and options.keys() <= {"max_new_tokens", "do_sample"}:
        assert widths == [(1, 14), (3, 1), (3, 1), (3, 1), (3, 1)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_leaves_the_padded_cache(side: str) -> None:
    model, inputs = build(*CAUSAL["llama"]), batch(side, labels=False)
    real = inputs["attention_mask"] == 1
    with torch.no_grad():
        expected = model(**inputs, use_cache=True)
        with unpadded(model):
            output = model(**inputs, use_cache=True)
            last = model(**inputs, use_cache=True, logits_to_keep=1).logits
    torch.testing.assert_close(output.logits[real], expected.logits[real], rtol=1e-3, atol=1e-4)
    if side == "left":
        torch.testing.assert_close(last, expected.logits[:, -1:], rtol=1e-3, atol=1e-4)
    for a, b in zip(output.past_key_values.layers, expected.past_key_values.layers, strict=True):
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            assert x.shape == y.shape
            torch.testing.assert_close(x.transpose(1, 2)[real], y.transpose(1, 2)[real], rtol=1e-3, atol=1e-4)
            assert (x.transpose(1, 2)[~real] == 0).all()
