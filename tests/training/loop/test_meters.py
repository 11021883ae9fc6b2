"""What MFU counts, against torch's own counter of a forward and a backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config

from hf_attn_patch.training import Flops, Throughput


def small(kind: str) -> Any:
    if kind == "decoder":
        config = GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=64, n_positions=32)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    config = BertConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64, vocab_size=64,
        attn_implementation="eager",
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


@pytest.mark.parametrize(("kind", "causal"), [("decoder", True), ("encoder", False)])
@pytest.mark.parametrize("forward_only", [False, True])
def test_operations_are_those_that_torch_counts(kind: str, causal: bool, forward_only: bool) -> None:
    torch.manual_seed(0)
    model, lengths = small(kind), [5, 12]
    products = scores = 0
    for length in lengths:
        with FlopCounterMode(display=False) as counter:
            out = model(torch.randint(64, (1, length)))[0]
            if not forward_only:
                out.sum().backward()
        counts = counter.get_flop_counts()["Global"]
        scores += counts.pop(torch.ops.aten.bmm)
        products += sum(counts.values())
    expected = products + (scores / 2 if causal else scores)  # eager attention works out both halves
    assert Flops(model, causal=causal, forward_only=forward_only).of(lengths) == expected


def test_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    speed = Throughput(peak_flops=1000.0, memory=0.5)
    assert (speed.tokens_per_second, speed.mfu) == (0.0, None)
    clock[0] += 4.0
    speed.step(8, 2000.0)
    assert (speed.tokens_per_second, speed.mfu) == (2.0, 0.5)
    clock[0] += 30.0
    speed.pause()  # an evaluation
    clock[0] += 2.0
    speed.step(8, 2000.0)
    assert speed.tokens_per_second == (0.5 * 8 + 8) / (0.5 * 4 + 2)
    assert speed.steps == [(4.0, 8, 2000.0), (2.0, 8, 2000.0)]
    assert Throughput().mfu is None
