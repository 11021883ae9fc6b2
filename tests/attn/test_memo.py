"""What is kept with a tensor is found while it is surely true: writes, inference mode, capture, the order of layers."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_attn_patch.attn import memo


def layer(config: Any, index: Any) -> Any:
    return SimpleNamespace(config=config, layer_idx=index)


def buffer(inference: bool) -> torch.Tensor:
    with torch.inference_mode(inference):
        return torch.zeros(4, dtype=torch.int64)


@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "ask"]), st.sampled_from("ab"), st.integers(0, 3)), min_size=2, max_size=30
    ),
    st.booleans(),
    st.booleans(),
)
def test_what_is_found_is_never_older_than_the_last_forward(
    steps: list[tuple[str, str, int]], inference: bool, in_mode: bool
) -> None:
    """Writes come between forwards: where the next layer is of another model, or not a later one."""
    x = buffer(inference)
    configs = {"a": object(), "b": object()}
    last: tuple[str, int] | None = None
    wanted = False
    for step, model, index in steps:
        if step == "write":
            wanted = True
            continue
        begins = last is None or last[0] != model or index <= last[1]
        with torch.inference_mode(in_mode):
            if wanted and (begins or not inference):
                with torch.inference_mode(inference or in_mode):
                    x.add_(1)
                wanted = False
            memo.asks(layer(configs[model], index))
            found = memo.recall(x, "sum")
            assert found is None or found == int(x.sum())
            if found is None:
                memo.keep(x, "sum", int(x.sum()))
            elif inference:
                assert not begins
        last = model, index
    memo.nobody_asks()


@pytest.mark.parametrize("inference", [False, True])
def test_the_layers_of_one_forward_share(inference: bool) -> None:
    x, config = buffer(inference), object()
    with torch.inference_mode(inference):
        memo.asks(layer(config, 2))  # hybrids begin somewhere
        memo.keep(x, "key", "value")
        for index in (3, 5, 6):
            memo.asks(layer(config, index))
            assert memo.recall(x, "key") == memo.recall(x, "key") == "value"
            assert memo.recall(x, "another") is None


@pytest.mark.parametrize("who", [layer(None, None), layer(object(), None), layer(object(), torch.tensor(1))])
def test_layers_without_a_number_share_only_what_counts_its_writes(who: Any) -> None:
    for inference, found in ((False, "value"), (True, None)):
        x = buffer(inference)
        memo.asks(who)
        memo.keep(x, "key", "value")
        memo.asks(who)
        assert memo.recall(x, "key") == found


def test_another_thread_works_it_out_itself() -> None:
    x, config = buffer(True), object()
    memo.asks(layer(config, 0))
    memo.keep(x, "key", "value")
    found: list[Any] = []

    def other() -> None:
        memo.asks(layer(config, 1))
        found.append(memo.recall(x, "key"))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    memo.asks(layer(config, 1))
    assert [*found, memo.recall(x, "key")] == [None, "value"]


@pytest.mark.parametrize("inference", [False, True])
def test_all_tensors_that_it_came_from_count(inference: bool) -> None:
    x, y, config = buffer(False), buffer(inference), object()
    memo.asks(layer(config, 0))
    memo.keep(x, "key", "value", y)
    memo.asks(layer(config, 1))
    assert memo.recall(x, "key", y) == "value"
    assert memo.recall(x, "key", y.clone()) is None  # equal is not the same
    assert memo.recall(x, "key") is None
    memo.asks(layer(config, 0))
    assert memo.recall(x, "key", y) == (None if inference else "value")
    if not inference:
        y.zero_()
        assert memo.recall(x, "key", y) is None


def test_what_is_made_in_inference_mode_stays_there() -> None:
    x = buffer(False)
    with torch.inference_mode():
        memo.keep(x, "key", "value")
        memo.keep(x, "host", "number", in_any_mode=True)
        assert memo.recall(x, "key") == "value"
    assert memo.recall(x, "key") is None
    assert memo.recall(x, "host", in_any_mode=True) == "number"


def test_graphs_that_are_captured_work_out_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by whether the tensor is on a GPU and its stream is captured, which stands here for both."""
    now = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now)

    class OnGPU(torch.Tensor):
        is_cuda = True

    x, mine, config = torch.zeros(2).as_subclass(OnGPU), torch.zeros(2).as_subclass(OnGPU), object()
    memo.asks(layer(config, 0))
    memo.keep(x, "key", "before")
    memo.keep(mine, "key", "before", made=True)
    now = True
    for index, found in ((1, None), (2, "in the graph"), (3, "in the graph"), (0, None)):
        memo.asks(layer(config, index))
        assert memo.recall(x, "key") == found
        if found is None:
            memo.keep(x, "key", "in the graph")
    assert memo.recall(mine, "key") is None
    memo.keep(mine, "key", "mine", made=True)
    memo.asks(layer(config, 0))  # ours was made in this very graph, whoever asks
    assert memo.recall(mine, "key") == "mine"
    now = False
    assert memo.recall(x, "key") is None
    assert memo.recall(mine, "key") == "mine"


def test_tensors_of_ours_count_writes_in_inference_mode() -> None:
    with torch.inference_mode():
        with memo.counted():
            x = torch.zeros(2)
        assert not x.is_inference() and torch.is_inference_mode_enabled()
        memo.asks(layer(None, None))
        memo.keep(x, "key", "value", made=True)
        assert memo.recall(x, "key") == "value"
        x.add_(1)
        assert memo.recall(x, "key") is None


def test_a_static_buffer_keeps_only_so_much() -> None:
    x = buffer(False)
    for i in range(1000):
        memo.keep(x, i, "value")
    assert memo.recall(x, 999) == "value"
    assert sum(len(getattr(x, name, ())) for name in memo._ATTRIBUTES) <= 64


def test_nothing_is_kept_alive() -> None:
    x, y, config = buffer(False), buffer(False), type("Config", (), {})()
    memo.keep(x, "key", "value", y)
    gone = weakref.ref(y)
    del y
    gc.collect()
    assert gone() is None
    assert memo.recall(x, "key", buffer(False)) is None
    memo.asks(layer(config, 0))
    memo.nobody_asks()
    gone_too = weakref.ref(config)
    del config
    gc.collect()
    assert gone_too() is None
