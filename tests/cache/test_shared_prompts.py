"""N answers to one prompt: computed once and kept once, and the same tokens as when every row has its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoding import FAMILIES, SIZES
from every_family import config_of, model_of
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_attn_patch import GrowingCache, enable
from hf_attn_patch.attn import shared_attend
from hf_attn_patch.cache import beforehand, beginnings, repeated_prompts
from hf_attn_patch.cache.growing_cache import use_growing_cache
from hf_attn_patch.cache.shared_prefix import SharedLayer
from hf_attn_patch.compat.calls import generate_keyword
from hf_attn_patch.compat.later import LaterTensor
from hf_attn_patch.decoding import cuda_graphs
from hf_attn_patch.hf import shared_attention

DECODERS = ["llama", "gemma2", "gemma3", "mistral", "gpt2"]
WITH_FULL_LAYERS = {"llama", "gemma2", "gemma3", "gpt2"}


@pytest.fixture(autouse=True)
def _share_short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginnings, "SHARE_FROM", 1)
    monkeypatch.setattr(beforehand, "DEVICES", {"cpu"})
    monkeypatch.setattr(beforehand, "WORTH", 0)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The rows of the shared parts that attention went over, one entry a call."""
    calls: list[tuple[int, ...]] = []

    def counted(q: Tensor, parted: Any, **options: Any) -> Tensor:
        calls.append(tuple(part.keys.shape[0] for part in parted.shared))
        return shared_attend.attend_shared(q, parted, **options)

    monkeypatch.setattr(shared_attention, "attend_shared", counted)
    return calls


def build(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def prompts(*of: int) -> dict[str, Tensor]:
    """Prompts by number, of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 128, (4, 11), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 0, 7)):
        mask[row, :padding] = 0
        ids[row, :padding] = 0
    return {"input_ids": ids[list(of)], "attention_mask": mask[list(of)]}


def both(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """What generate gives with transformers' own attention and cache, and with ours."""
    found = []
    for ours in (False, True):
        if ours:
            enable(model, cache="growing")
        torch.manual_seed(1)
        found.append(model.generate(**inputs, max_new_tokens=20, return_dict_in_generate=True, **options))
    return found[0], found[1]


CALLS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "sampled answers to one": ((0,), {"do_sample": True, "num_return_sequences": 6}),
    "beams": ((0,), {"num_beams": 4}),
    "beams of three prompts": ((0, 1, 3), {"num_beams": 3, "num_return_sequences": 2}),
    "sampled answers to two": ((0, 1), {"do_sample": True, "num_return_sequences": 4}),
    "repeated rows": ((0, 0, 0, 2, 2, 2), {"do_sample": True}),
    "repeated rows, padded": ((1, 1, 1, 1, 3, 3, 3, 3), {"do_sample": True}),
    "rows repeated unevenly": ((0, 1, 1, 1, 1, 2, 2, 0), {"do_sample": True}),
    "rows repeated in turn": ((0, 1, 2, 0, 1, 2, 0, 1, 2), {"do_sample": True}),
    "greedy": ((1, 1, 3, 3), {}),
    "chunked prefill": ((0, 1), {"do_sample": True, "num_return_sequences": 3, "prefill_chunk_size": 4}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", DECODERS)
def test_same_tokens(family: str, call: str, parts: list[tuple[int, ...]]) -> None:
    rows, options = CALLS[call]
    expected, out = both(build(family), prompts(*rows), **options)
    torch.testing.assert_close(out.sequences, expected.sequences, rtol=0, atol=0)
    assert {*parts} == ({(len({*rows}),)} if family in WITH_FULL_LAYERS else set())


@pytest.mark.parametrize("call", ["sampled answers to two", "beams of three prompts", "rows repeated unevenly"])
@pytest.mark.parametrize("family", DECODERS)
def test_steps_are_recorded(
    family: str, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_graphs, "DEVICES", {"cpu"})  # a recording is then the work done again
    rows, options = CALLS[call]
    model = build(family)
    torch.manual_seed(1)
    expected = model.generate(**prompts(*rows), max_new_tokens=40, **options)
    enable(model, cache="growing", cuda_graphs=True)
    torch.manual_seed(1)
    out = model.generate(**prompts(*rows), max_new_tokens=40, return_dict_in_generate=True, **options)
    torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
    assert not [message for message in caplog.messages if "decoding steps of" in message]


def test_what_a_prefill_returns_is_given_to_each_row() -> None:
    options = {"output_logits": True, "output_hidden_states": True, "num_return_sequences": 3, "do_sample": True}
    expected, out = both(build("llama"), prompts(0, 1), **options)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
    valid = prompts(0, 1)["attention_mask"].repeat_interleave(3, 0).bool()
    for a, b in zip(out.hidden_states[0], expected.hidden_states[0], strict=True):
        torch.testing.assert_close(a[valid], b[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_keep_nothing_and_streams_of_hidden_states(family: str) -> None:
    model = model_of(config_of(family))
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))
    expected, out = both(model, {"input_ids": ids}, num_return_sequences=3, do_sample=True, output_hidden_states=True)
    assert torch.equal(out.sequences, expected.sequences)
    for a, b in zip(out.hidden_states[0], expected.hidden_states[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = build("llama"), []
    enable(model, cache="growing")
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    model.generate(**prompts(0, 1), max_new_tokens=3, do_sample=True, num_return_sequences=5)
    assert seen == [(2, 11), (10, 1), (10, 1)]


def test_the_prompt_is_kept_once() -> None:
    """16 answers of 128 tokens to a prompt of 2,048: at most 1.15 times the keys of one prompt and the answers."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    enable(model, cache="growing")
    ids = torch.randint(3, 128, (1, 2048))
    out = model.generate(ids, max_new_tokens=128, do_sample=True, num_return_sequences=16, return_dict_in_generate=True)
    cache = out[next(name for name in ("past_key_values", "cache") if name in dict(out))]
    per_key = 8 * 4 * 2  # of one head: D, fp32, K and V
    for layer in cache.layers:
        tensors = {t.untyped_storage().data_ptr(): t.untyped_storage() for part in layer.shared for t in part[:2]}
        tensors |= {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (layer.own.keys, layer.own.values)}
        held = sum(storage.nbytes() for storage in tensors.values())
        assert held <= 1.15 * (2048 + 16 * 127) * per_key, held / per_key
    assert cache.get_seq_length() == 2048 + 127
    assert cache.layers[0].keys.shape == (16, 1, 2175, 8)  # whoever looks sees every row whole
    assert not cache.layers[0].shared


def test_a_prefix_of_many_calls(parts: list[tuple[int, ...]]) -> None:
    model, whole = build("llama"), prompts(0, 0, 2, 2)
    keyword = generate_keyword()
    system = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(3))
    enable(model, cache="growing")
    prefix = GrowingCache(config=model.config)
    with torch.no_grad():
        model(system, **{keyword: prefix})
    before = copy.deepcopy(prefix)
    for rows in (None, 4):
        ids = torch.cat([system.expand(4, -1), whole["input_ids"]], 1)
        torch.manual_seed(2)
        expected = model.generate(ids, max_new_tokens=12, do_sample=True)
        parts.clear()
        torch.manual_seed(2)
        out = model.generate(ids, max_new_tokens=12, do_sample=True, **{keyword: prefix.share(rows)})
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        assert (1, 2) in parts  # what all prompts begin with, and the two prompts of two answers each
    for layer, same in zip(prefix.layers, before.layers, strict=True):
        torch.testing.assert_close(layer.keys, same.keys, rtol=0, atol=0)


def test_a_prefix_with_padding_behind_it() -> None:
    """Questions of different lengths after one prefix: the padding lies between."""
    model, keyword = build("llama"), generate_keyword()
    question = prompts(0, 1, 3)
    system = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([system.expand(3, -1), question["input_ids"]], 1)
    mask = torch.cat([torch.ones(3, 9, dtype=torch.int64), question["attention_mask"]], 1)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12)
    enable(model, cache="growing")
    prefix = GrowingCache(config=model.config)
    with torch.no_grad():
        model(system, **{keyword: prefix})
    out = model.generate(ids, attention_mask=mask, max_new_tokens=12, **{keyword: prefix.share(3)})
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "ours, one backend", "with weights"])
def test_attention_that_does_not_know_parts_sees_whole_keys(attention: str, parts: list[tuple[int, ...]]) -> None:
    model, inputs = build("llama"), prompts(0)
    model.set_attn_implementation(attention if attention in ("eager", "sdpa") else "eager")
    expected = DynamicCache(config=model.config)
    ids = inputs["input_ids"]
    keyword = generate_keyword()
    with torch.no_grad():
        model(ids, **{keyword: expected})
        expected.batch_repeat_interleave(3)
        logits = model(ids[:, :3].view(3, 1), **{keyword: expected}).logits
    if attention.startswith("ours"):
        enable(model, backend="reference")
    elif attention == "with weights":
        enable(model)
    cache = GrowingCache(config=model.config)
    with torch.no_grad():
        model(ids, **{keyword: cache})
        cache.batch_repeat_interleave(3)
        assert all(isinstance(layer, SharedLayer) for layer in cache.layers)
        out = model(ids[:, :3].view(3, 1), output_attentions=attention == "with weights", **{keyword: cache})
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-4)
    assert not parts
    if attention == "with weights":
        assert out.attentions[0].shape == (3, 8, 1, 12)


def test_gradients_reach_what_is_shared() -> None:
    keys = torch.randn(1, 2, 6, 4, requires_grad=True)
    cache = GrowingCache()
    cache.update(keys, keys * 2, 0)
    cache.batch_repeat_interleave(3)
    out, _ = cache.update(*(torch.randn(3, 2, 1, 4) for _ in range(2)), 0)
    assert type(out) is Tensor
    out.sum().backward()
    assert keys.grad is not None
    torch.testing.assert_close(keys.grad, torch.full_like(keys, 3.0))


def test_another_implementation_has_its_prompts_computed_once_and_copied() -> None:
    model, seen = build("llama"), []
    expected = model.generate(**prompts(0, 1), max_new_tokens=9, num_beams=3)
    use_growing_cache(model)
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    out = model.generate(**prompts(0, 1), max_new_tokens=9, num_beams=3, return_dict_in_generate=True)
    torch.testing.assert_close(out.sequences, expected, rtol=0, atol=0)
    assert seen[0] == (2, 11)
    cache = out[next(name for name in ("past_key_values", "cache") if name in dict(out))]
    assert not any(isinstance(layer, SharedLayer) for layer in cache.layers)


def test_inputs_that_differ_elsewhere_are_not_taken_for_alike() -> None:
    model, seen = build("gpt2"), []
    enable(model, cache="growing")
    model.transformer.wte.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    inputs = prompts(0, 0)
    kinds = torch.zeros(2, 11, dtype=torch.int64)
    kinds[1] = 5
    torch.manual_seed(0)
    model.generate(**inputs, token_type_ids=kinds, max_new_tokens=2)
    assert (1, 11) not in seen
    seen.clear()
    model.generate(**inputs, token_type_ids=kinds[:1].expand(2, -1), max_new_tokens=2)
    assert (1, 11) in seen


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checksum", [None, 0], ids=["checksum", "all the same"])
def test_which_rows_are_alike(kind: torch.dtype, checksum: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums only say where to look."""
    rows = torch.tensor([[1, 2], [1, 2], [0, 2], [1, 2], [2, 1], [0, 2]])
    more = torch.tensor([[[8, 1]], [[8, 1]], [[8, 1]], [[8, 3]], [[8, 1]], [[8, 1]]])
    if checksum is not None:
        monkeypatch.setattr(repeated_prompts, "_checksum", lambda value: torch.zeros(len(value), dtype=torch.int64))
    values = rows.to(kind)
    kinds: dict[tuple[float, ...], int] = {}
    expected = [kinds.setdefault(tuple(row), len(kinds)) for row in values.tolist()]
    found = repeated_prompts._repeats([values])
    if checksum is None:
        assert found == expected
    alike = [(i, j) for i in range(6) for j in range(6) if found[i] == found[j]]
    assert (0, 1) in alike
    assert (0, 3) in alike
    assert all(torch.equal(values[i], values[j]) for i, j in alike)
    assert sorted({*found}) == list(range(len({*found})))
    apart = repeated_prompts._repeats([values, more.float(), torch.empty(6, 0, dtype=torch.int64)])
    assert apart[3] not in apart[:3]
    assert apart[0] == apart[1]


def test_what_looks_at_shared_states_sees_a_tensor() -> None:
    cache = GrowingCache()
    first = torch.randn(2, 2, 5, 4)
    with torch.no_grad():
        cache.update(first, first + 1, 0)
        cache.batch_repeat_interleave(2)
        token = torch.randn(4, 2, 1, 4)
        keys, values = cache.update(token, token, 0)
    assert type(keys) is LaterTensor
    expected = torch.cat([first[[0, 0, 1, 1]], token], 2)
    assert keys.shape == expected.shape
    torch.testing.assert_close(keys * 1, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([values, token], 2)[:, :, :5], expected[:, :, :5] + 1, rtol=0, atol=0)


def test_what_cannot_be_shared_is_said() -> None:
    with pytest.raises(ValueError, match="holds nothing yet"):
        GrowingCache().share()
    cache = GrowingCache()
    cache.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4), 0)
    with pytest.raises(ValueError, match="rows=3 is no multiple of the 2 rows"):
        cache.share(3)
