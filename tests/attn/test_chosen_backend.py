"""A backend counts where it was asked for: in its block, thread and task, and nowhere else."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import hf_attn_patch
from hf_attn_patch import AttentionError, use_backend


def which_ran(**given: Any) -> str:
    """Softcap is what torch_sdpa refuses by name and reference does not."""
    q = torch.ones(1, 2, 3, 8)
    try:
        hf_attn_patch.attention(q, q, q, softcap=1.0, **given)
    except AttentionError as error:
        return "torch_sdpa" if "'torch_sdpa'" in str(error) else "?"
    return "any"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["reference", "torch_sdpa"]), max_size=6), st.integers(0, 2**16))
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
