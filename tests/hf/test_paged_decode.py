"""Continuous batching with a block table, by Triton's interpreter: one call, and whole generations."""

from __future__ import annotations

from typing import Any

import interpreter
import pytest
import torch
from family_inputs import tokens
from family_runs import IMPLEMENTATION, build, pair
from paged_requests import PagedRequests
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import initialization

from hf_attn_patch import AttentionError
from hf_attn_patch.hf import continuous_batching as paged
from hf_attn_patch.hf.attention_function import attention_forward
from hf_attn_patch.hf.paged_decode import paged_decode

pytest.importorskip("triton")


@pytest.mark.parametrize("heads", [(4, 4, 16), (8, 2, 32), (4, 1, 16)], ids=str)
def test_pages_are_written_and_read(heads: tuple[int, int, int]) -> None:
    x = PagedRequests([37, 1, 16, 20, 0, 0], 16, *heads, interpreter.DEVICE, torch.float32)
    before = [pages.clone() for pages in x.pages]
    wanted = x.truth(torch.float64)
    out = paged_decode(
        x.query, x.key, x.value, x.pages[0], x.pages[1], x.table, x.cu, scaling=None, softcap=None, sinks=None
    )
    torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=1e-5)
    for pages, old, new in zip(x.pages, before, (x.key, x.value), strict=True):
        for r, n in enumerate(x.lengths[:4]):
            old[x.table[r, (n - 1) // 16], (n - 1) % 16] = new[0, :, r]
        assert torch.equal(pages, old)


def test_numbers_that_do_not_go_together() -> None:
    x = PagedRequests([5, 3], 16, 4, 2, 16, interpreter.DEVICE, torch.float32)
    with pytest.raises(AttentionError, match="a block table of 2 requests came with 1 queries and 2 lengths"):
        paged_decode(
            x.query[:, :, :1],
            x.key,
            x.value,
            x.pages[0],
            x.pages[1],
            x.table,
            x.cu,
            scaling=1,
            softcap=None,
            sinks=None,
        )


def test_a_window_is_not_forgotten() -> None:
    x = PagedRequests([5, 3], 16, 4, 2, 16, interpreter.DEVICE, torch.float32)
    module: Any = torch.nn.Module()
    module.sliding_window = 4
    handed: dict[str, Any] = {"block_table": x.table, "k_cache": x.pages[0], "v_cache": x.pages[1]}
    with pytest.raises(AttentionError, match=r"a sliding window of 4.*max_blocks_per_request=0"):
        attention_forward(
            module, x.query, x.key, x.value, None, cu_seq_lens_q=x.cu, cu_seq_lens_k=x.cu, write_index=[], **handed
        )


def test_without_a_gpu_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreter.DEVICE == "cuda":
        pytest.skip("there is a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x = PagedRequests([5], 16, 4, 2, 16, "cpu", torch.float32)
    with pytest.raises(AttentionError, match="max_blocks_per_request=0"):
        paged_decode(
            x.query, x.key, x.value, x.pages[0], x.pages[1], x.table, x.cu, scaling=1, softcap=None, sinks=None
        )


@pytest.mark.parametrize("name", ["llama", "llama-mqa", "mistral"])
def test_generate_batch(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The block table that a user asks for; sliding layers have none, which transformers says."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[5].shape[0])
        return paged_decode(*args, **kwargs)

    monkeypatch.setattr(paged, "paged_decode", counted)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 11, 6)]
    generation = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=32, block_size=8, max_batch_tokens=32, max_blocks_per_request=8)
    kwargs = {"generation_config": generation, "continuous_batching_config": batching}
    outputs = build(name, IMPLEMENTATION).generate_batch(prompts, **kwargs)
    said = any("the decode fast path is not available" in message for message in caplog.messages)
    if hasattr(initialization, "ATTN_TYPE_TO_ALLOCATOR") and name != "mistral":
        assert calls, "no step took the block table"
        assert not said
    else:  # before 5.20 the table goes to FlashAttention alone
        assert not calls
        assert said
    found = {tuple(o.prompt_ids): o.generated_tokens for o in outputs.values()}
    eager = pair(name)[1]
    for prompt in prompts:
        wanted = eager.generate(torch.tensor([prompt]), generation_config=generation)
        assert found[tuple(prompt)] == wanted[0, len(prompt) :].tolist()
