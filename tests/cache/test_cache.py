"""GrowingCache: without the copies, in bounded memory, and where only concatenation is right."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from cache_states import HKV, D, assert_same, config, states
from transformers import DynamicCache, FalconH1Config, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_attn_patch.cache.growing_cache import GrowingCache
from hf_attn_patch.cache.layers import GrowingLayer, GrowingMixin, GrowingSlidingWindowLayer


@torch.no_grad()
@pytest.mark.parametrize("left", [0, 2])
def test_states_that_someone_took_out_outlive_a_crop(left: int) -> None:
    cache = GrowingCache()
    cache.update(*states(1, 5), 0)
    taken = cache.layers[0].keys
    before = taken.clone()
    cache.crop(left - 5)
    cache.update(*states(1, 3), 0)
    assert cache.get_seq_length() == left + 3
    assert torch.equal(taken, before)


@torch.no_grad()
def test_a_token_moves_a_token() -> None:
    """Storage changes only when the room is used up, and the number of moves is logarithmic."""
    cache, moves, last = GrowingCache(), 0, None
    for _ in range(3000):
        keys, _ = cache.update(*states(1, 1), 0)
        moves += keys.data_ptr() != last
        last = keys.data_ptr()
    # a full buffer of C keys is followed by 1.25 * (C + 1) rounded up: 256 512 768 1024 1536 2048 2816 3584
    assert moves == 8
    assert cache.capacity() == 3584


@torch.no_grad()
def test_expected_length_bounds_the_room() -> None:
    cache = GrowingCache(expected_length=8192 + 128)
    cache.update(*states(1, 8192), 0)
    assert cache.capacity() == 8192 + 256
    cache = GrowingCache(expected_length=8)  # an estimate that turns out wrong is no limit
    cache.update(*states(1, 1000), 0)
    assert cache.capacity() == 1280


@torch.no_grad()
def test_sliding_window_memory_is_bounded() -> None:
    layer = GrowingSlidingWindowLayer(sliding_window=100)
    pointers = set()
    for _ in range(2000):
        keys, _ = layer.update(*states(1, 1))
        pointers.add(keys.data_ptr())
        assert keys.untyped_storage().nbytes() <= 512 * HKV * D * 4
        assert keys.is_contiguous() or keys.stride(2) == D
    assert keys.shape[2] == 100
    assert layer.keys.shape[2] == 99


@torch.no_grad()
def test_trim_and_pickle_carry_no_unused_room() -> None:
    cache = GrowingCache()
    cache.update(*states(2, 300), 0)
    exact = 2 * HKV * 300 * D * 4
    assert cache.layers[0].keys.untyped_storage().nbytes() > exact
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    assert len(buffer.getvalue()) < 4 * exact
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert loaded.layers[0].keys.untyped_storage().nbytes() == exact
    cache.trim()
    assert cache.layers[0].keys.untyped_storage().nbytes() == exact
    assert cache.capacity() == 300


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen keys"])
def test_gradients_survive_later_tokens(frozen: bool) -> None:
    """Attention saved the keys for its backward; a token cached later must not touch what it saved."""
    ours, theirs, grads = GrowingCache(), DynamicCache(), []
    k, v = states(1, 3)
    later = states(1, 1)
    for cache in (ours, theirs):
        q = torch.ones(1, HKV, 1, D, requires_grad=True)
        key, value = k.clone().requires_grad_(not frozen), v.clone().requires_grad_(not frozen)
        keys, values = cache.update(key, value, 0)
        out = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
        keys, values = cache.update(*later, 0)
        out = out + torch.nn.functional.scaled_dot_product_attention(q, keys, values)
        with torch.no_grad():
            cache.update(*later, 0)
        out.sum().backward()
        grads.append([q.grad] + ([] if frozen else [key.grad, value.grad]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_inference_mode_then_no_grad() -> None:
    cache, reference = GrowingCache(), DynamicCache()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad, torch.no_grad):
        k, v = states(1, 2)
        with mode():
            ours, theirs = cache.update(k, v, 0), reference.update(k, v, 0)
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)


@torch.no_grad()
def test_what_does_not_fit_is_left_to_cat() -> None:
    cache = GrowingCache()
    cache.update(*states(2, 3, torch.bfloat16), 0)
    keys, values = cache.update(*states(2, 1), 0)
    assert keys.dtype == values.dtype == torch.float32  # promoted, as torch.cat does
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        cache.update(*states(1, 1), 0)  # never broadcast into the buffer


@torch.no_grad()
def test_compiled_update_falls_back() -> None:
    cache = GrowingCache()
    cache.update(*states(1, 4), 0)

    @torch.compile(backend="eager")
    def step(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = cache.update(k, v, 0)
        return keys.sum() + values.sum()

    expected = [float(t.sum()) for t in cache.layers[0].__dict__.values() if isinstance(t, torch.Tensor)]
    k, v = states(1, 1)
    torch.testing.assert_close(float(step(k, v)), sum(expected) + float(k.sum() + v.sum()), rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 5
    cache.update(*states(1, 1), 0)
    assert cache.get_seq_length() == 6


@torch.no_grad()
def test_layer_types_follow_the_config() -> None:
    llama = GrowingCache(config=LlamaConfig(num_hidden_layers=2))
    assert [type(layer) for layer in llama.layers] == [GrowingLayer] * 2
    mistral = GrowingCache(config=MistralConfig(num_hidden_layers=2, sliding_window=8))
    assert [type(layer) for layer in mistral.layers] == [GrowingSlidingWindowLayer] * 2
    hybrid = FalconH1Config(num_hidden_layers=2)
    for ours, theirs in zip(GrowingCache(config=hybrid).layers, DynamicCache(config=hybrid).layers, strict=True):
        assert isinstance(ours, type(theirs))
        assert isinstance(ours, GrowingMixin)


@torch.no_grad()
def test_from_dynamic_continues() -> None:
    source, reference = DynamicCache(config=config()), DynamicCache(config=config())
    for S in (5, 3):
        for layer_idx in range(2):
            k, v = states(2, S)
            source.update(k, v, layer_idx)
            reference.update(k, v, layer_idx)
    cache = GrowingCache.from_dynamic(source)
    assert [type(layer) for layer in source.layers] == [DynamicSlidingWindowLayer, DynamicLayer]
    for layer_idx in range(2):
        k, v = states(2, 1)
        cache.update(k, v, layer_idx)
        reference.update(k, v, layer_idx)
    assert_same(cache, reference)
    with pytest.raises(TypeError, match="GrowingCache"):
        GrowingCache.from_dynamic(cache)


@torch.no_grad()
def test_data_of_another_cache() -> None:
    """The round trip of (distributed) data parallel: iterate one cache, build the next from it."""
    source = GrowingCache(config=config())
    for layer_idx in range(2):
        source.update(*states(2, 9), layer_idx)
    rebuilt = GrowingCache(tuple(source))
    assert [type(layer) for layer in rebuilt.layers] == [GrowingSlidingWindowLayer, GrowingLayer]
    for a, b in zip(source.layers, rebuilt.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=0, atol=0)


def test_offloaded_layers_keep_their_exact_size() -> None:
    try:
        DynamicCache(offloading=True)
    except RuntimeError as error:  # a CUDA build of torch without a GPU makes no stream
        pytest.skip(f"transformers' own cache cannot offload here: {error}")
    cache = GrowingCache(config=config(), offloading=True, offload_only_non_sliding=True)
    assert [type(layer) for layer in cache.layers] == [GrowingSlidingWindowLayer, DynamicLayer]
    assert type(GrowingCache(offloading=True).layer_class_to_replicate()) is DynamicLayer


@torch.no_grad()
def test_offload_frees_the_buffers() -> None:
    layer, reference = GrowingLayer(), DynamicLayer()
    for S in (3, 2):
        k, v = states(1, S)
        layer.update(k, v)
        reference.update(k, v)
        layer.offload()
        layer.prefetch()
        assert layer._room is None
        torch.testing.assert_close(layer.keys, reference.keys, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"growth": 0.9}, "growth"), ({"expected_length": 0}, "expected_length")]
)
def test_bad_settings(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrowingCache(**kwargs)


@torch.no_grad()
@pytest.mark.parametrize("kept", [False, True], ids=["nobody looks", "a view is kept"])
def test_cropped_room_is_used_again_unless_someone_looks(kept: bool) -> None:
    cache = GrowingCache()
    cache.update(*states(1, 10), 0)
    pointer = cache.layers[0].keys.data_ptr()
    view = cache.layers[0].keys[:, :, 5:] if kept else None
    before = None if view is None else view.clone()
    cache.crop(-4)
    keys, _ = cache.update(*states(1, 4), 0)
    assert (keys.data_ptr() == pointer) is not kept
    if view is not None:
        torch.testing.assert_close(view, before, rtol=0, atol=0)
