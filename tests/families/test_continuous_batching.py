"""generate_batch: continuous batching over a paged cache."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from family_inputs import tokens
from family_runs import IMPLEMENTATION, build, counted, pair
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import continuous_api
from works_with import works_with

import hf_attn_patch
from hf_attn_patch.hf import continuous_batching

GENERATION = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)


def generate_batch(model: Any, prompts: list[list[int]]) -> dict[tuple[int, ...], list[int]]:
    batching = ContinuousBatchingConfig(num_blocks=32, block_size=8, max_batch_tokens=16)
    outputs = model.generate_batch(prompts, generation_config=GENERATION, continuous_batching_config=batching)
    return {tuple(o.prompt_ids): o.generated_tokens for o in outputs.values()}


def one_by_one(name: str, prompts: list[list[int]]) -> dict[tuple[int, ...], list[int]]:
    eager = pair(name)[1]
    found = {}
    for prompt in prompts:
        made = eager.generate(torch.tensor([prompt]), generation_config=GENERATION)
        found[tuple(prompt)] = made[0, len(prompt) :].tolist()
    return found


def prompts_of(*lengths: int) -> list[list[int]]:
    return [tokens(1, n, seed=n)[0].tolist() for n in lengths]


@works_with("transformers", "continuous batching over a paged cache", "model.generate_batch(prompts, ...)")
@pytest.mark.parametrize("name", ["llama", "llama-mqa", "qwen2", "mistral", "gpt_oss"])
def test_generate_batch(name: str) -> None:
    """Requests of different lengths, more than fit in one step: the tokens are those of a greedy run of each."""
    prompts, model = prompts_of(3, 11, 6, 1, 9), build(name, IMPLEMENTATION)
    with counted(IMPLEMENTATION) as calls:
        assert generate_batch(model, prompts) == one_by_one(name, prompts)
    assert len(set(calls)) == 2
    assert model.config._attn_implementation == IMPLEMENTATION


@pytest.mark.parametrize("how", ["by name", "override"])
def test_flash_attention_that_is_installed_takes_nothing_from_us(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would exchange both names for FlashAttention, which no CPU runs."""
    for available in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
        monkeypatch.setattr(continuous_api, available, lambda *_, **__: True)
    prompts = prompts_of(3, 11)
    if how == "by name":
        model = build("llama", IMPLEMENTATION)
        assert generate_batch(model, prompts) == one_by_one("llama", prompts)
    else:
        model = build("llama", "sdpa")
        with hf_attn_patch.override("sdpa"), counted("sdpa") as calls:
            assert generate_batch(model, prompts) == one_by_one("llama", prompts)
        assert len(set(calls)) == 2
        with pytest.raises((ImportError, ValueError), match=r"(?i)flash"):  # undone: transformers does as it does
            generate_batch(model, prompts)


def test_the_mask_that_comes_with_borders_is_not_read() -> None:
    """ "sdpa" makes transformers write a mask of all queries by all keys, which says what the borders say."""
    prompts, seen = prompts_of(3, 11, 6), []
    attend = continuous_batching.attend

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((kwargs["visibility"].kind, kwargs.get("bias")))
        return attend(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, hf_attn_patch.override("sdpa"):
        patch.setattr(continuous_batching, "attend", spy)
        generate_batch(build("llama", "sdpa"), prompts)
    assert {bias for _, bias in seen} == {None}
    assert len(seen) >= 2 * GENERATION.max_new_tokens


MANAGER, UTILS = "transformers.generation.continuous_batching.continuous_api", "transformers.modeling_utils"
#: children of one process, which has imported what transformers itself imports
IMPORTED = f"""
import gc, os, sys
import accelerate, torch, torch._dynamo, torch.distributed.tensor

gc.disable()  # a third of what an import takes
for order in sys.argv[1:]:
    if not os.fork():
        assert not any(name.startswith(("hf_attn_patch", "{MANAGER}", "{UTILS}")) for name in sys.modules)
        for name in order.split():
            __import__(name)
        import {UTILS}
        from {MANAGER} import ContinuousBatchingManager
        from hf_attn_patch.compat import batching
        here = ContinuousBatchingManager.switch_to_cb_friendly_attn.__globals__["__name__"] == batching.__name__
        print(order, here, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_whatever_is_imported_first() -> None:
    orders = [
        f"hf_attn_patch {MANAGER} {UTILS}",
        f"{MANAGER} {UTILS} hf_attn_patch",
        f"{MANAGER} hf_attn_patch {UTILS}",
        f"hf_attn_patch {UTILS} {MANAGER}",
        "hf_attn_patch transformers.generation.utils",
    ]
    done = subprocess.run([sys.executable, "-c", IMPORTED, *orders], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{order} True" for order in orders], done.stderr
    assert "generate_batch does not take" not in done.stderr
