"""The models of ``models.py``, what each row calls, and the truth that every implementation is held to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, StaticCache

import hf_attn_patch
from benchmarks import assert_conforms
from benchmarks.measure import DEVICE
from benchmarks.model_rows import OURS, Inputs, Row, Variant
from hf_attn_patch.compat.cache_keyword import keyword_of

AHEAD = 512  # tokens that decoding may go beyond the row's length
#: what is timed, and what it gives: logits, or the loss and some gradients
Work = tuple[Callable[[], Any], Callable[[], list[torch.Tensor]]]
FULL = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
}


def build(kv_heads: int, sizes: dict[str, int], dtype: torch.dtype, **changes: int) -> Any:
    """A Llama with random weights; the number of KV heads is scaled down with the heads in a tiny one."""
    heads = sizes["num_attention_heads"]
    config = LlamaConfig(**{**sizes, **changes}, num_key_value_heads=max(1, kv_heads * heads // 32))
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def switch(model: Any, variant: Variant) -> AbstractContextManager[Any]:
    """Give the model the variant's attention; a context within which it is unpadded or not."""
    if variant.attention == OURS:
        hf_attn_patch.enable(model, cuda_graphs="compiled" if variant.graphs and variant.compiled else variant.graphs)
    else:
        model.set_attn_implementation(variant.attention)
    return hf_attn_patch.unpadded(model) if variant.unpadded else nullcontext()


def new_cache(model: Any, variant: Variant, room: int) -> Cache:
    if variant.static:
        return StaticCache(config=model.config, max_cache_len=room)
    kind = hf_attn_patch.GrowingCache if variant.growing else DynamicCache
    return kind(config=model.config)


def work_of(model: Any, row: Row, variant: Variant, inputs: Inputs) -> Work:
    """One call of the row's kind."""
    if row.kind == "train":
        return train(model, inputs)
    return (decode if row.kind == "decode" else prefill)(model, variant, inputs)


def prefill(model: Any, variant: Variant, inputs: Inputs) -> Work:
    @torch.no_grad()
    def work() -> Any:
        cache = new_cache(model, variant, inputs.ids.shape[1])
        return model(
            input_ids=inputs.ids,
            attention_mask=inputs.mask,
            position_ids=inputs.positions,
            **{keyword_of(model.forward): cache},
            use_cache=True,
            logits_to_keep=1,
        )

    return work, lambda: [work().logits]


def decode(model: Any, variant: Variant, inputs: Inputs) -> Work:
    config, (B, S) = model.config, inputs.ids.shape
    cache = new_cache(model, variant, S + AHEAD)
    generator = torch.Generator(DEVICE).manual_seed(11)
    with torch.no_grad():
        for layer in range(config.num_hidden_layers):
            shape = (B, config.num_key_value_heads, S, config.head_dim)
            options: Any = {"generator": generator, "device": DEVICE, "dtype": model.dtype}
            cache.update(torch.randn(shape, **options), torch.randn(shape, **options), layer)
    assert inputs.mask is not None
    mask = torch.nn.functional.pad(inputs.mask, (0, AHEAD), value=1)
    position = inputs.mask.sum(1, keepdim=True) - 1
    if variant.static:
        return decode_compiled(model, cache, inputs, position)

    @torch.no_grad()
    def work() -> Any:
        length = int(cache.get_seq_length())
        return model(
            input_ids=inputs.ids[:, -1:],
            attention_mask=mask[:, : length + 1],
            position_ids=position + (length - S + 1),
            **{keyword_of(model.forward): cache},
            use_cache=True,
            logits_to_keep=1,
        )

    return work, lambda: [work().logits]


def decode_compiled(model: Any, cache: Cache, inputs: Inputs, position: torch.Tensor) -> Work:
    """One step under torch.compile with CUDA graphs: the 4-D mask is made outside the graph, as generate does."""
    assert inputs.mask is not None
    S = inputs.ids.shape[1]
    torch.compiler.reset()
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    room = cache.layers[0].keys.shape[2]
    valid = torch.nn.functional.pad(inputs.mask, (0, room - S), value=0).bool()
    state = {"length": S}

    @torch.no_grad()
    def work() -> Any:
        length = state["length"]
        state["length"] = length + 1
        valid[:, length] = True
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(
            input_ids=inputs.ids[:, -1:].clone(),
            attention_mask=valid[:, None, None, :].clone(),
            position_ids=position + (length - S + 1),
            **{keyword_of(model.forward): cache},
            use_cache=True,
            logits_to_keep=1,
        )

    return work, lambda: [work().logits.clone()]


def train(model: Any, inputs: Inputs) -> Work:
    def work() -> Any:
        model.zero_grad(set_to_none=True)
        output = model(
            input_ids=inputs.ids,
            attention_mask=inputs.mask,
            position_ids=inputs.positions,
            labels=inputs.labels,
            use_cache=False,
            **inputs.extra,
        )
        output.loss.backward()
        return output.loss.detach()

    def result() -> list[torch.Tensor]:
        loss = work()
        first = model.model.layers[0].self_attn
        return [loss[None], first.q_proj.weight.grad.clone(), first.k_proj.weight.grad.clone()]

    return work, result


def assert_agrees(found: list[torch.Tensor], reference: list[torch.Tensor]) -> None:
    """Two implementations in low precision, at full size: relative L2 distance under 5%."""
    for a, b in zip(found, reference, strict=True):
        distance = float((a.double() - b.double()).norm() / b.double().norm())
        if not distance < 0.05:
            raise AssertionError(f"differs from sdpa by {distance:.2g}")


def check_conformance(variant: Variant, kv_heads: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """On two layers and a padded batch: no further from fp32 (fp64) than twice what eager is in this precision."""
    high = torch.float64 if dtype is torch.float32 else torch.float32
    low_model = build(kv_heads, sizes, dtype, num_hidden_layers=2, vocab_size=128)
    row = Row("train", 3, 160, "padded")
    inputs = Inputs(row, 128)
    assert inputs.mask is not None
    call = {"input_ids": inputs.ids, "attention_mask": inputs.mask, "use_cache": False}
    real = inputs.mask == 1
    with torch.no_grad():
        low_model.set_attn_implementation("eager")
        low = low_model(**call).logits[real]
        reference = copy.deepcopy(low_model).to(high)(**call).logits[real]
        with switch(low_model, variant):
            found = low_model(**call).logits[real]
    assert_conforms(found, low, reference)
