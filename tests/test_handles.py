"""Nothing global is left behind: switches are undone in any order."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tiny import tiny_llama
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_attn_patch
from hf_attn_patch import AttentionError, enable, override
from hf_attn_patch.cache.growing_cache import use_growing_cache
from hf_attn_patch.decoding.cuda_graphs import use_cuda_graphs
from hf_attn_patch.handle import Handle

SEEDS = st.integers(0, 2**16)
STOCK = ALL_ATTENTION_FUNCTIONS["sdpa"], AttentionMaskInterface()["sdpa"]


def tables() -> tuple[Any, Any]:
    return ALL_ATTENTION_FUNCTIONS["sdpa"], AttentionMaskInterface()["sdpa"]


def instance_state(model: torch.nn.Module) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in model.modules()]


def test_a_handle_undoes_once() -> None:
    calls: list[int] = []
    handle = Handle(lambda: calls.append(1))
    with handle:
        with handle:
            pass
        assert not calls  # the outer block goes on
    handle()
    handle.undo()
    assert calls == [1]
    with pytest.raises(RuntimeError, match="undone before"), handle:
        pass


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["open", "close", "close again", "enter", "error", "drop"]), max_size=14), SEEDS)
def test_overrides_in_any_order_leave_stock_sdpa(steps: list[str], seed: int) -> None:
    order = random.Random(seed)
    live: list[override] = []
    undone: list[override] = []
    try:
        for step in steps:
            if step == "open":
                live.append(override("sdpa"))
            elif step == "enter":
                with override("sdpa"), override("sdpa"):
                    assert tables()[0] is not STOCK[0]
            elif step == "error":
                with pytest.raises(KeyError), override("sdpa"):
                    raise KeyError
            elif step == "close" and live:
                handle = live.pop(order.randrange(len(live)))
                handle()
                undone.append(handle)
            elif step == "close again" and undone:
                undone[order.randrange(len(undone))].undo()
            elif step == "drop":
                gc.collect(1)  # young ones: all that a process of thousands of tests holds takes a second
            assert (tables() == STOCK) == (not live)
    finally:
        for handle in order.sample(live, len(live)):
            handle()
    assert tables() == STOCK


def test_a_handle_that_is_dropped_stays_in_force() -> None:
    handle = override("sdpa")
    dropped = override("sdpa")
    del dropped
    gc.collect()
    others = [override("sdpa") for _ in range(50)]  # at the same addresses, perhaps
    for other in others:
        other()
    handle()
    assert tables() != STOCK
    from hf_attn_patch import enabling

    for owner in list(enabling._replacements["sdpa"].owners):
        enabling._withdraw(enabling._replacements["sdpa"], owner)
    assert tables() == STOCK


def test_what_others_put_in_place_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody wraps sdpa while it is overridden; whoever lets go first."""
    stock = STOCK[0]

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs)

    ours = override("sdpa")
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", theirs)
    again = override("sdpa")
    ours()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not theirs
    again()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
    q = torch.randn(1, 2, 3, 8)
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 1, True
    AttentionInterface.register("sdpa", before)  # what they had kept is ours, and does what stock does
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_attn_patch.enabling.attention_forward", lambda *_, **__: pytest.fail("ours ran"))
        out = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, q, q, None)[0]
    torch.testing.assert_close(out, stock(module, q, q, q, None)[0], rtol=0, atol=0)
    AttentionInterface.register("sdpa", stock)
    assert tables() == STOCK


def test_an_override_that_fails_changes_nothing() -> None:
    for name in ("eager", "no such thing"):
        with pytest.raises(AttentionError, match=name):
            override(name)
    assert tables() == STOCK


def test_growing_a_thousand_times_is_one_wrapper_and_none_switches_it_off() -> None:
    model = enable(tiny_llama(2))
    before = instance_state(model)
    for _ in range(1000):
        enable(model, cache="growing", cuda_graphs=True)
    ids = torch.arange(1, 9)[None]
    out = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, do_sample=False)
    assert type(out.get("cache") or out.get("past_key_values")) is hf_attn_patch.GrowingCache
    enable(model, cache=None, cuda_graphs=False)
    assert instance_state(model) == before
    out = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, do_sample=False)
    assert type(out.get("cache") or out.get("past_key_values")) is not hf_attn_patch.GrowingCache


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["grow", "grow more", "graph", "enable", "close"]), max_size=10), SEEDS)
def test_switches_of_a_model_in_any_order(steps: list[str], seed: int) -> None:
    order = random.Random(seed)
    model = enable(tiny_llama(2, num_hidden_layers=1))
    before = instance_state(model)
    makers: dict[str, Callable[[], Any]] = {
        "grow": lambda: use_growing_cache(model),
        "grow more": lambda: use_growing_cache(model, growth=2.0),
        "graph": lambda: use_cuda_graphs(model),
    }
    live: list[tuple[str, Any]] = []
    enabled = False
    for step in steps:
        if step == "enable":
            enabled = order.random() < 0.5
            enable(model, cache="growing" if enabled else None)
        elif step == "close" and live:
            live.pop(order.randrange(len(live)))[1]()
        elif step in makers:
            live.append((step, makers[step]()))
        grows = [name for name, _ in live if name.startswith("grow")]
        assert ("_prepare_cache_for_generation" in vars(model)) == (enabled or bool(grows))
        assert ("forward" in vars(model)) == ("graph" in [name for name, _ in live])
    enable(model)
    for _, handle in order.sample(live, len(live)):
        handle()
        handle()
    assert instance_state(model) == before


def test_a_method_of_the_instance_comes_back_and_others_may_stand_before_ours() -> None:
    model = tiny_llama(2)
    name = "_prepare_cache_for_generation"
    own = vars(model)[name] = getattr(model, name)
    first, second = use_growing_cache(model), use_growing_cache(model, growth=3.0)
    first()
    assert vars(model)[name].asked.setting.growth == 3.0
    ours = vars(model)[name]
    vars(model)[name] = lambda *args, **kwargs: ours(*args, **kwargs)
    second()
    out = model.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=2, return_dict_in_generate=True)
    assert type(out.get("cache") or out.get("past_key_values")) is not hf_attn_patch.GrowingCache
    vars(model)[name] = own


def test_handles_keep_no_model_alive() -> None:
    model = tiny_llama(2)
    handles = [use_growing_cache(model), use_cuda_graphs(model)]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    for handle in handles:
        handle()


def test_a_copy_is_switched_by_itself() -> None:
    model = enable(tiny_llama(2), cache="growing", cuda_graphs=True)
    twin = copy.deepcopy(model)
    enable(model, cache=None, cuda_graphs=False)
    assert "forward" in vars(twin) and "_prepare_cache_for_generation" in vars(twin)
    enable(twin, cache=None, cuda_graphs=False)
    assert not {"forward", "_prepare_cache_for_generation"} & (vars(twin).keys() | vars(model).keys())


def test_unpadded_handles_in_any_order() -> None:
    model = enable(tiny_llama(2, num_hidden_layers=1).eval())
    ids, mask = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])

    def zeros_at_padding() -> bool:
        with torch.no_grad():
            return not model(input_ids=ids, attention_mask=mask).logits[1, 2:].any()

    assert not zeros_at_padding()
    first, second = hf_attn_patch.unpadded(model), hf_attn_patch.unpadded(model)
    assert zeros_at_padding()
    first.undo()
    first.undo()
    assert zeros_at_padding()
    second()
    assert not zeros_at_padding()
    with pytest.raises(KeyError), hf_attn_patch.unpadded(model):
        raise KeyError
    assert not zeros_at_padding()
