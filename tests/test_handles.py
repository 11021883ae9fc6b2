"""Nothing global is left behind: switches are undone in any order, and a backend counts where it was asked for."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import os
import random
import signal
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tiny import save_tiny, tiny_llama
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as hf_logging

import hf_attn_patch
from hf_attn_patch import AttentionError, enable, override, use_backend
from hf_attn_patch.cache.growing_cache import use_growing_cache
from hf_attn_patch.decoding.cuda_graphs import use_cuda_graphs
from hf_attn_patch.handle import Handle

SEEDS = st.integers(0, 2**16)
STOCK = ALL_ATTENTION_FUNCTIONS["sdpa"], AttentionMaskInterface()["sdpa"]


def tables() -> tuple[Any, Any]:
    return ALL_ATTENTION_FUNCTIONS["sdpa"], AttentionMaskInterface()["sdpa"]


def which_ran(**given: Any) -> str:
    """Softcap is what torch_sdpa refuses by name and reference does not."""
    q = torch.ones(1, 2, 3, 8)
    try:
        hf_attn_patch.attention(q, q, q, softcap=1.0, **given)
    except AttentionError as error:
        return "torch_sdpa" if "'torch_sdpa'" in str(error) else "?"
    return "any"


def instance_state(model: torch.nn.Module) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in model.modules()]


# -- handles ---------------------------------------------------------------------------------------------------------


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


# -- models ----------------------------------------------------------------------------------------------------------


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


# -- backends --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["reference", "torch_sdpa"]), max_size=6), SEEDS)
def test_blocks_are_left_in_any_order(names: list[str], seed: int) -> None:
    order = random.Random(seed)
    blocks = [use_backend(name) for name in names]
    for block in blocks:
        block.__enter__()
    while blocks:
        assert which_ran() == ("torch_sdpa" if blocks[-1].name == "torch_sdpa" else "any")
        blocks.pop(order.randrange(len(blocks))).__exit__(None, None, None)
    assert which_ran() == "any"


def test_a_block_is_entered_again_inside_itself_and_decorates() -> None:
    block = use_backend("torch_sdpa")
    with block:
        with block:
            pass
        assert which_ran() == "torch_sdpa"
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        assert which_ran() == "torch_sdpa"
    assert which_ran() == "any"
    assert use_backend("torch_sdpa")(which_ran)() == "torch_sdpa"
    assert which_ran() == "any"


def test_threads_insist_on_backends_of_their_own() -> None:
    names = ["torch_sdpa", "reference", None] * 3
    found: list[str] = [""] * len(names)
    together = threading.Barrier(len(names))

    def work(i: int, name: str | None) -> None:
        together.wait()
        if name is None:
            together.wait()
            found[i] = which_ran()
        else:
            with use_backend(name):
                together.wait()
                found[i] = which_ran()

    threads = [threading.Thread(target=work, args=item) for item in enumerate(names)]
    with use_backend("torch_sdpa"):  # and none of them is in this one
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == ["torch_sdpa", "any", "any"] * 3


def test_async_tasks_insist_on_backends_of_their_own() -> None:
    async def work(name: str | None, order: int) -> str:
        if name is None:
            await asyncio.sleep(0.001 * order)
            return which_ran()
        with use_backend(name):
            await asyncio.sleep(0.001 * order)  # the blocks of the others are entered and left meanwhile
            return which_ran()

    async def main() -> list[str]:
        return await asyncio.gather(*(work(n, 6 - i) for i, n in enumerate(["torch_sdpa", None, "reference"] * 2)))

    assert asyncio.run(main()) == ["torch_sdpa", "any", "any"] * 2
    assert which_ran() == "any"


def test_compiled_code_follows_threads_and_tasks() -> None:
    q = torch.ones(1, 2, 3, 8)
    torch._dynamo.reset()
    plain = torch.compile(lambda q: hf_attn_patch.attention(q, q, q, softcap=1.0), backend="eager")

    def ran() -> str:
        try:
            plain(q)
        except AttentionError:
            return "torch_sdpa"
        except torch._dynamo.exc.TorchDynamoException as error:  # raised while it traces
            return "torch_sdpa" if "'torch_sdpa'" in str(error) else str(error)
        return "any"

    found: list[str] = []
    assert ran() == "any"
    with use_backend("torch_sdpa"):
        assert ran() == "torch_sdpa"
        thread = threading.Thread(target=lambda: found.append(ran()))
        thread.start()
        thread.join()
    assert found == ["any"]
    assert ran() == "any"

    async def work(name: str, order: int) -> str:
        with use_backend(name):
            await asyncio.sleep(0.01 * order)
            return ran()

    async def main() -> list[str]:
        return list(await asyncio.gather(work("torch_sdpa", 2), work("reference", 1), work("torch_sdpa", 3)))

    assert asyncio.run(main()) == ["torch_sdpa", "any", "torch_sdpa"]
    assert ran() == "any"
    torch._dynamo.reset()


# -- other settings of the process -------------------------------------------------------------------------------------


KERNELS = "flash", "mem_efficient", "math", "cudnn"


def settings_of_the_process() -> dict[str, Any]:
    """What packages like this one are found to change behind their users' backs."""
    config = torch._dynamo.config
    return {
        "environment": dict(os.environ),
        "dynamo": (config.recompile_limit, config.accumulated_recompile_limit),
        "filters": list(warnings.filters),
        "loggers": [(logger.level, list(logger.handlers)) for logger in map(logging.getLogger, (None, "transformers"))],
        "bars": (hf_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()),
        "random": torch.random.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32),
        "kernels": [
            getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()
            for kind in ("flash", "mem_efficient", "math", "cudnn")
        ],
        "default": (torch.get_default_dtype(), torch.get_default_device()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


def test_running_leaves_the_process_as_it_was() -> None:
    model = enable(tiny_llama(2, num_hidden_layers=1), cache="growing")
    ids, mask = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    before = settings_of_the_process()
    model(input_ids=ids, labels=ids).loss.backward()
    model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with hf_attn_patch.unpadded(model.eval()), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    hf_attn_patch.explain(model, batch=1, q_len=4, kv_len=4)
    with override("sdpa"), use_backend("reference"):
        model(input_ids=ids)
    assert settings_of_the_process() == before


def test_training_leaves_the_process_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from hf_attn_patch.training.loop.schedule import Count
    from hf_attn_patch.training.model.compiling import compile_layers
    from hf_attn_patch.training.options import UptrainOptions
    from hf_attn_patch.training.run import load_run

    (tmp_path / "text.txt").write_text("A few words.\n\nAnd a few more of them.\n" * 50)
    model = save_tiny(tmp_path / "model", tiny_llama(2, num_hidden_layers=1))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    options = UptrainOptions(
        model=model,
        dataset=str(tmp_path / "text.txt"),
        output=str(tmp_path / "out"),
        mode="lora",
        batch_size=2,
        sequence_length=32,
        tokens=Count(1000),
    )
    before = settings_of_the_process()
    run = load_run(options)
    assert run.accelerator.gradient_accumulation_steps == options.batch_size // options.micro_batch_size
    compile_layers(run.student, one_shape=True)
    after = settings_of_the_process()
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {"random", "environment", "loggers"}  # new weights; accelerate's own
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "3"


def test_adapters_are_the_same_everywhere_and_nothing_else_is_seeded() -> None:
    pytest.importorskip("peft")
    from hf_attn_patch.training.model.trainable import choose_trainable

    torch.manual_seed(5)
    state, weights = torch.random.get_rng_state(), []
    for _ in range(2):
        wrapped = choose_trainable(tiny_llama(2, num_hidden_layers=1), "lora", seed=1)
        weights.append([p.clone() for p in wrapped.parameters() if p.requires_grad])
        torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    model = tiny_llama(2, num_hidden_layers=1)
    torch.random.set_rng_state(state)
    choose_trainable(model, "lora", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


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
