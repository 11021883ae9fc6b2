"""A cache that reaches the attention function was not taken by its layer: that is said, under every name."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.masking_utils import create_causal_mask

from hf_attn_patch import AttentionError, unpadded
from hf_attn_patch.compat.cache_keyword import NAMES, is_paged, keyword_of, take_cache, update_cache
from hf_attn_patch.hf.attention_function import attention_forward

#: what the installed release calls it, and what it does not
NEW = keyword_of(create_causal_mask)
OLD = "past_key_values" if NEW == "cache" else "cache"


def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=40, max_position_embeddings=64)
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, attn_implementation="hf_attn_patch").eval()


class Layer(torch.nn.Module):
    layer_idx = 0
    is_causal = True


@pytest.mark.parametrize("name", ["cache", "past_key_values", "past_key_value", "layer_past"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "a user's own"])
def test_it_is_refused_by_name(name: str, kind: str) -> None:
    q = torch.randn(1, 2, 3, 8)
    made = {"dynamic": DynamicCache, "static": lambda: StaticCache(llama().config, 8), "a user's own": object}
    with pytest.raises(AttentionError, match=f"Layer handed '{name}' .*instead of filling it.*use_cache=False"):
        attention_forward(Layer(), q, q, q, None, **{name: made[kind]()})
    nothing: dict[str, Any] = {name: None}
    out, _ = attention_forward(Layer(), q, q, q, None, **nothing)  # nothing was handed on
    assert out.shape == (1, 3, 2, 8)


def old_layer(model: Any, takes: str) -> None:
    """Let each attention take a cache by the name ``takes`` alone, and hand all else on, as layers of users do."""
    for layer in model.model.layers:
        stock = layer.self_attn.forward

        def forward(self: Any, hidden_states: Tensor, stock: Any = stock, **kwargs: Any) -> Any:
            cache = kwargs.pop(takes, None)
            q, k, v = (
                p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                for p in (self.q_proj, self.k_proj, self.v_proj)
            )
            if cache is not None:
                k, v = cache.update(k, v, self.layer_idx)
            out, weights = attention_forward(self, q, k, v, scaling=self.scaling, **kwargs)
            return self.o_proj(out.flatten(2)), weights

        layer.self_attn.forward = MethodType(forward, layer.self_attn)


def test_a_model_whose_layers_know_the_other_name_is_refused_and_runs_without_a_cache() -> None:
    """Stock eager and sdpa go on without a word, and generate other tokens than without a cache."""
    model, ids = llama(), torch.arange(3, 9)[None]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    old_layer(model, NEW)
    cached, without = (model.generate(ids, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, without)
    old_layer(model, OLD)
    with pytest.raises(AttentionError, match=f"LlamaAttention handed '{NEW}' .*DynamicCache"):
        model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, use_cache=False), without)


@pytest.mark.parametrize("name", [*NAMES, "kv_store"])
def test_a_layer_finds_its_cache_under_any_name(name: str) -> None:
    cache, first, second = DynamicCache(), torch.randn(2, 1, 3, 8), torch.randn(2, 1, 2, 8)
    for x in (first, second):
        kwargs = {name: cache, "use_cache": True}
        keys, values = update_cache(Layer(), x, -x, kwargs)
        assert kwargs == {"use_cache": True}
    assert torch.equal(keys, torch.cat([first, second], 2))
    assert torch.equal(values, -keys)


def test_two_caches_are_refused_and_the_same_one_twice_is_one() -> None:
    cache = DynamicCache()
    assert take_cache({"cache": cache, "past_key_values": cache, "layer_past": None}) is cache
    assert take_cache({"use_cache": True}) is None
    with pytest.raises(TypeError, match="as cache and as layer_past"):
        take_cache({"cache": cache, "layer_past": DynamicCache()})


def test_a_function_without_a_cache_is_named() -> None:
    def forward(hidden_states: Tensor, kv_store: Any = None) -> None: ...

    with pytest.raises(TypeError, match=r"forward of transformers .* none of the names .* has hidden_states, kv_store"):
        keyword_of(forward)


def test_a_paged_cache_is_known_and_wants_its_places() -> None:
    from transformers.generation.continuous_batching import PagedAttentionCache

    paged = PagedAttentionCache.__new__(PagedAttentionCache)
    assert is_paged(paged)
    assert not is_paged(DynamicCache())
    with pytest.raises(TypeError, match=r"Layer got a paged cache without the places .* continuous batching"):
        update_cache(Layer(), torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8), {"cache": paged})


class NextForCausalLM(LlamaForCausalLM):
    """A model whose forward has another name for its cache, as a release might."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, kv_cache: Any = None, **rest: Any) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask, **{NEW: kv_cache}, **rest)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cache_under_an_unknown_name_is_never_filled_with_a_packed_prompt(rows: int) -> None:
    """In the packed layout one row would hold only its own tokens, and the next step would look elsewhere."""
    model = NextForCausalLM._from_config(llama().config, attn_implementation="hf_attn_patch").eval()
    ids, mask = torch.arange(7).expand(rows, 7), torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(rows, 7)
    with torch.no_grad():
        want = model(ids, attention_mask=mask, kv_cache=DynamicCache()).logits
        with unpadded(model):
            with pytest.raises(AttentionError, match="the name 'kv_cache' under which NextForCausalLM takes a cache"):
                model(ids, attention_mask=mask, kv_cache=DynamicCache())
            cache = DynamicCache()
            model(ids, kv_cache=cache)  # nothing to pack
            assert cache.get_seq_length() == 7
            out = model(ids, attention_mask=mask, use_cache=True)
            cache = out[NEW]
            assert cache.layers[0].keys.shape[:3] == (rows, 2, 7)
            torch.testing.assert_close(out.logits[:, 3:], want[:, 3:])
            without = model(ids, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(without[:, 3:], want[:, 3:])
