"""Tokens chosen inside CUDA graphs, several steps in flight: the same tokens and random numbers as without."""

from __future__ import annotations

import functools
from typing import Any

import decoding
import pytest
import torch
from decoding import generate

import hf_attn_patch
from hf_attn_patch.decoding import flight

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_attn_patch.decoding.step.FUSED_SHORT", 0)


build = functools.partial(decoding.build, device="cuda")
batch = functools.partial(decoding.batch, "cuda")
ENDS = list(range(5, 40))
HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "common": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    "min-p": {"do_sample": True, "min_p": 0.1, "typical_p": 0.9},
    "rows end": {"do_sample": True, "eos_token_id": ENDS, "min_new_tokens": 12},
    "ends": {"eos_token_id": ENDS, "min_new_tokens": 20},
}


@pytest.fixture
def landings(monkeypatch: pytest.MonkeyPatch) -> list[flight.Landing]:
    found: list[flight.Landing] = []
    run = flight.Flight.run

    def kept(self: flight.Flight) -> flight.Landing:
        found.append(run(self))
        return found[-1]

    monkeypatch.setattr(flight.Flight, "run", kept)
    return found


@pytest.mark.parametrize("graphs", [True, "compiled"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
@pytest.mark.parametrize("family", ["llama", "gemma3", "bart"])
def test_the_same_tokens(family: str, how: dict[str, Any], graphs: Any, landings: list[flight.Landing]) -> None:
    if graphs == "compiled" and (family != "llama" or "temperature" in how):
        pytest.skip("one family and way tells enough")
    model, inputs = build(family), batch()
    expected = generate(model, inputs, **how)
    after = torch.cuda.get_rng_state()
    hf_attn_patch.enable(model, cuda_graphs=graphs)
    for _ in range(2):
        torch.testing.assert_close(generate(model, inputs, **how), expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.cuda.get_rng_state(), after, rtol=0, atol=0)
    assert not any(landing.error for landing in landings), landings
    assert len(landings) == 2


def test_past_windows_and_buffers(landings: list[flight.Landing]) -> None:
    for family in ("llama", "gemma2", "mistral"):
        model, inputs = build(family), batch(3, 30)
        expected = generate(model, inputs, max_new_tokens=300)
        hf_attn_patch.enable(model)
        torch.testing.assert_close(generate(model, inputs, max_new_tokens=300), expected, rtol=0, atol=0)
    assert len(landings) == 6


def test_the_host_does_not_wait_for_a_step(landings: list[flight.Landing]) -> None:
    """Between two steps nothing synchronises but the look at an earlier one."""
    model, inputs = build("llama", dtype=torch.bfloat16), batch()
    hf_attn_patch.enable(model)
    generate(model, inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        generate(model, inputs)
    names = [event.name for event in profile.events()]
    assert landings[-1].steps >= 50
    assert sum("cudaGraphLaunch" in name for name in names) in (0, landings[-1].steps)  # recorded at once
    assert sum("cudaStreamSynchronize" in name for name in names) < 40
