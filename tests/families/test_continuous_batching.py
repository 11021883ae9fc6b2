"""generate_batch: continuous batching over a paged cache."""

from __future__ import annotations

import inspect

import pytest
import torch
from family_inputs import tokens
from family_runs import IMPLEMENTATION, build, counted, pair
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import PagedAttentionCache
from works_with import works_with

import hf_attn_patch

#: Since the attention function updates the paged cache itself, the manager admits implementations by name only, and
#: ours comes in as "sdpa". Before, it looks for "paged|" and the name of the model's own implementation.
_BY_NAME = "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters


@works_with(
    "transformers",
    "continuous batching over a paged cache",
    'with hf_attn_patch.override("sdpa"): model.generate_batch(prompts, ...)',  # before 5.19 without the first half
)
@pytest.mark.parametrize("name", ["llama", "llama-mqa", "qwen2", "mistral", "gpt_oss"])
def test_generate_batch(name: str) -> None:
    """Requests of different lengths, more than fit in one step: the tokens are those of a greedy run of each."""
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 11, 6, 1, 9)]
    generation = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=32, block_size=8, max_batch_tokens=16)
    kwargs = {"generation_config": generation, "continuous_batching_config": batching}
    if _BY_NAME:
        model = build(name, IMPLEMENTATION)
        with counted(f"paged|{IMPLEMENTATION}") as calls:
            outputs = model.generate_batch(prompts, **kwargs)
    else:
        model = build(name, "sdpa" if name != "gpt_oss" else "eager")
        model.config._attn_implementation_internal = (
            "sdpa"  # transformers offers gpt_oss no sdpa: it would drop the sinks
        )
        with hf_attn_patch.override("sdpa"), counted("sdpa") as calls:
            outputs = model.generate_batch(prompts, **kwargs)
    assert len(set(calls)) == 2
    found = {tuple(o.prompt_ids): o.generated_tokens for o in outputs.values()}
    eager = pair(name)[1]
    for prompt in prompts:
        wanted = eager.generate(torch.tensor([prompt]), generation_config=generation)
        assert found[tuple(prompt)] == wanted[0, len(prompt) :].tolist()
