"""generate() with GrowingCache: the same tokens as with DynamicCache, on every path that touches the cache."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DynamicCache,
    EncoderDecoderCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_attn_patch import AttentionError, enable
from hf_attn_patch.cache import beforehand
from hf_attn_patch.cache import buffers as cache_room
from hf_attn_patch.cache.growing_cache import GrowingCache, use_growing_cache
from hf_attn_patch.cache.layers import GrowingMixin

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2)
GEMMA3 = Gemma3TextConfig(
    **SIZES,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"],
)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=None)
BART = BartConfig(
    vocab_size=64,
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    init_std=0.3,
    forced_eos_token_id=None,
    eos_token_id=None,
)
FALCON_H1 = FalconH1Config(
    **SIZES, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8
)
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LLAMA),
    "gemma3": (Gemma3ForCausalLM, GEMMA3),
    "gpt2": (GPT2LMHeadModel, GPT2),
    "bart": (BartForConditionalGeneration, BART),
    "falcon_h1": (FalconH1ForCausalLM, FALCON_H1),
}
INPUT_IDS = torch.tensor([[5, 9, 3, 22, 7, 41], [0, 0, 8, 33, 12, 6], [0, 17, 2, 54, 31, 4]])
PATHS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beam groups returned": {"num_beams": 3, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(autouse=True)
def _buffers_made_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, and however small they are."""
    monkeypatch.setattr(beforehand, "DEVICES", {"cpu"})
    monkeypatch.setattr(beforehand, "WORTH", 0)


def build(family: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    cls, config = FAMILIES[family]
    model: PreTrainedModel = cls(copy.deepcopy(config)).eval()
    model.set_attn_implementation(attention)
    return model


def generate(model: Any, rows: int = 3, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(1)
    ids = INPUT_IDS[:rows]
    out = model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=20,
        return_dict_in_generate=True,
        **{"do_sample": False, **kwargs},
    )
    return out.sequences, out.past_key_values


def assert_growing(cache: Any) -> None:
    if isinstance(cache, EncoderDecoderCache):
        assert type(cache.cross_attention_cache) is DynamicCache
        cache = cache.self_attention_cache
    assert type(cache) is GrowingCache
    assert all(isinstance(layer, GrowingMixin) for layer in cache.layers)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens(family: str, path: str) -> None:
    if path == "prompt lookup" and family == "falcon_h1":
        pytest.skip("a recurrent state cannot be rolled back: transformers refuses speculation")
    if path == "chunked prefill" and family == "bart":
        pytest.skip("an encoder-decoder has no prompt to prefill")
    model = build(family)
    rows = 1 if path == "prompt lookup" else 3
    expected, _ = generate(model, rows, **PATHS[path])
    undo = use_growing_cache(model)
    tokens, cache = generate(model, rows, **PATHS[path])
    assert_growing(cache)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
    undo()
    assert not isinstance(generate(model, rows, **PATHS[path])[1], GrowingCache)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "hf_attn_patch"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_same_logits_with_every_attention(family: str, attention: str) -> None:
    model = build(family, attention)
    # flex in plain PyTorch: compiling it takes a minute
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = []
        for cache in (DynamicCache(config=model.config), GrowingCache(config=model.config)):
            steps: list[Any] = []
            mask = (INPUT_IDS != 0).long()
            for ids in (INPUT_IDS, INPUT_IDS[:, :1], INPUT_IDS[:, 1:2], INPUT_IDS[:, 2:5]):
                if steps:
                    mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                steps.append(model(ids, attention_mask=mask, past_key_values=cache).logits)
            logits.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_assisted_decoding(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model, assistant = build(family), build(family, seed=0)
    with torch.no_grad():  # an assistant that is right now and then, so that tokens are accepted and taken back
        for p in assistant.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    expected, _ = generate(model, 1)
    for generator in (model, assistant):
        use_growing_cache(generator)
    init, rooms = cache_room.KVBuffers.__init__, []

    def counted(*args: Any) -> None:
        rooms.append(1)
        init(*args)

    monkeypatch.setattr(cache_room.KVBuffers, "__init__", counted)
    tokens, cache = generate(model, 1, assistant_model=assistant)
    assert_growing(cache)
    assert len(rooms) == 4  # one a layer and model: what is taken back leaves its room to what follows
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [None, "offloaded"])
@pytest.mark.parametrize("attention", ["sdpa", "hf_attn_patch"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "bart"])
def test_on_a_gpu(family: str, attention: str, implementation: str | None) -> None:
    model = build(family, attention).cuda()
    call = {"input_ids": INPUT_IDS.cuda(), "attention_mask": (INPUT_IDS != 0).long().cuda(), "max_new_tokens": 300}
    call |= {"do_sample": False, "cache_implementation": implementation}
    if implementation and family == "bart":
        pytest.skip("transformers' own offloaded cache leaves keys of encoder-decoder models on the CPU")
    # not with the offloaded cache of transformers: its tokens differ from run to run
    expected = model.generate(**{**call, "cache_implementation": None})
    use_growing_cache(model)
    torch.testing.assert_close(model.generate(**call), expected, rtol=0, atol=0)


def test_encoder_decoder_cache_of_the_user() -> None:
    model, expected = build("bart"), generate(build("bart"), num_beams=3)[0]
    mine = EncoderDecoderCache(GrowingCache(config=model.config), GrowingCache(config=model.config))
    tokens, cache = generate(model, past_key_values=mine, num_beams=3)
    assert cache is mine
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)


def test_a_prefix_is_reused() -> None:
    model = build("llama")
    prefix = GrowingCache(config=model.config)
    with torch.no_grad():
        model(INPUT_IDS[:1, :4], past_key_values=prefix)
    for _ in range(2):  # the copy that generate works on leaves the prefix as it is
        tokens, _ = generate(model, 1, past_key_values=copy.deepcopy(prefix))
        torch.testing.assert_close(tokens, generate(model, 1)[0], rtol=0, atol=0)
        assert prefix.get_seq_length() == 4


def test_room_ends_where_generate_ends() -> None:
    model = build("llama")
    use_growing_cache(model)
    ids = torch.randint(1, 64, (1, 300))
    out = model.generate(input_ids=ids, max_new_tokens=20, return_dict_in_generate=True, do_sample=False)
    assert out.past_key_values.capacity() == 512
    assert out.past_key_values.layers[0].expected_length in (319, 320)


class _Made(TorchDispatchMode):
    """Notes the memory [B, 2, 256, 8] of a cache as it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.new_empty.default and tuple(out.shape[1:]) == (2, 256, 8):
            self.memory.append(weakref.ref(out.untyped_storage()))
        return out

    def held(self) -> int:
        return sum(storage() is not None for storage in self.memory)


def test_all_buffers_are_made_before_the_first_mlp() -> None:
    """Also of a model that runs fewer layers than its config has, and where one of them takes none."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 4}, num_key_value_heads=2)).eval()
    layers = model.model.layers = model.model.layers[:3]
    use_growing_cache(model)
    seen: list[tuple[int, int]] = []
    with _Made() as made:
        for layer in layers:
            layer.mlp.register_forward_pre_hook(lambda *_: seen.append((len(made.memory), made.held())))
        model.generate(INPUT_IDS, max_new_tokens=2)
        assert seen == [(6, 6)] * 6
        made.memory.clear()
        layers[1].forward = lambda hidden_states, *_, **__: hidden_states
        model.generate(INPUT_IDS, max_new_tokens=2)
        assert seen[6:] == [(6, 6), (6, 6), (6, 4), (6, 4)]  # what no layer took is gone at the next token


@pytest.mark.parametrize("inference", [False, True])
def test_layers_that_differ_make_their_own_buffers(inference: bool) -> None:
    together, narrow, wide = beforehand.Beforehand(3), torch.ones(2, 1, 5, 8), torch.ones(2, 4, 5, 8)
    first = together.take(narrow, narrow.double(), 256)
    assert first is not None and [t.dtype for t in first] == [torch.float32, torch.float64]
    with torch.inference_mode(inference):
        other = (narrow, narrow.double()) if inference else (wide, wide.double())
        assert together.take(*other, 256) is None
    assert not together.made and together.take(narrow, narrow.double(), 256) is None


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_what_the_user_asks_for_is_respected(implementation: str) -> None:
    model = build("llama")
    use_growing_cache(model)
    mine = DynamicCache(config=model.config)
    assert generate(model, past_key_values=mine)[1] is mine
    assert generate(model, use_cache=False)[1] is None
    cache = generate(model, cache_implementation=implementation)[1]
    assert isinstance(cache, GrowingCache) is (implementation == "dynamic")


def test_a_copy_of_the_model_grows_its_own() -> None:
    model = build("llama")
    undo = use_growing_cache(model)
    twin = copy.deepcopy(model)
    undo()
    assert_growing(generate(twin)[1])
    assert type(generate(model)[1]) is DynamicCache


@pytest.mark.parametrize("twice", [False, True])
def test_a_model_that_was_pickled_grows_its_own(twice: bool) -> None:
    """As torch.save of a whole model and processes that are spawned do it."""
    model = build("llama")
    for _ in range(1 + twice):
        use_growing_cache(model)
    again = pickle.loads(pickle.dumps(model))
    tokens, cache = generate(again)
    assert_growing(cache)
    assert again.__dict__["_prepare_cache_for_generation"].model is again
    torch.testing.assert_close(tokens, generate(model)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"cache": "static"}, "there is no cache 'static'"), ({"cuda_graphs": "some"}, "cuda_graphs='some' is not known")],
)
def test_what_enable_refuses_leaves_the_model_as_it_was(arguments: dict[str, Any], message: str) -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(AttentionError, match=message):
        enable(model, **arguments)
    encoder = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    encoder.set_attn_implementation("eager")
    with pytest.raises(AttentionError, match="BertModel cannot generate"):
        enable(encoder, cache="growing")
    assert [m.config._attn_implementation for m in (model, encoder)] == ["eager", "eager"]


@pytest.mark.parametrize("growth", [0.5, float("nan"), float("inf")])
def test_growth_is_a_number_from_one_on(growth: float) -> None:
    with pytest.raises(ValueError, match="growth must be at least 1 and finite"):
        GrowingCache(growth=growth)


def test_wrappers_are_looked_through() -> None:
    model = build("llama")
    wrapper = torch.nn.Sequential(model)
    undo, undo_again = use_growing_cache(wrapper), use_growing_cache(wrapper)
    assert_growing(generate(model)[1])
    undo_again()
    assert_growing(generate(model)[1])
    undo()
    assert type(generate(model)[1]) is DynamicCache


def test_what_cannot_generate_is_refused() -> None:
    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(TypeError, match="BertModel cannot generate"):
        use_growing_cache(model)


def test_training_with_use_cache() -> None:
    model = build("llama").train()
    grads = []
    for cache in (DynamicCache(config=model.config), GrowingCache(config=model.config)):
        model.zero_grad()
        first = model(INPUT_IDS[:1, :4], past_key_values=cache).logits
        second = model(INPUT_IDS[:1, 4:], past_key_values=cache).logits
        (first.sum() + second.square().sum()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
