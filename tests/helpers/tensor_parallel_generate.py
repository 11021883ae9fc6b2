"""Run by torchrun, one process a device: a model in shards by ``tp_plan="auto"`` generates what the whole one does.

torchrun --nproc-per-node 2 tests/helpers/tensor_parallel_generate.py FOLDER cuda
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1" if sys.argv[2] == "cpu" else "0")  # before the kernels

import torch
from leaving import leave
from transformers import AutoModelForCausalLM, GenerationConfig

import hf_attn_patch
from hf_attn_patch.attn import ladder, plan
from hf_attn_patch.decoding import cuda_graphs as graphs
from hf_attn_patch.decoding import flight, generating, remembered, step

WAYS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 0.8, "top_k": 20},
    {"do_sample": True, "eos_token_id": list(range(5, 40)), "min_new_tokens": 12},
    {"num_beams": 3},
]


def generate(model: Any, inputs: dict[str, torch.Tensor], way: dict[str, Any], tokens: int = 40) -> torch.Tensor:
    torch.manual_seed(3)
    config = GenerationConfig(max_new_tokens=tokens, pad_token_id=0, **{"do_sample": False, **way})
    out: torch.Tensor = model.generate(**inputs, generation_config=config)
    return out


def in_fewer_kernels(rank: int, whole: Any, shards: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Steps that are written down, and those that are remembered for the next call."""
    # a call as short as this one would not be worth fewer kernels; a CPU's attention asks for numbers on the way
    step.FUSED_SHORT = step.SHORT = generating.SHORT = 0
    first: Any = "triton_decode"
    ladder._CPU = (first, *(name for name in ladder._CPU if name != first))  # type: ignore[assignment]
    plan.forget()
    hf_attn_patch.enable(shards, cuda_graphs=False)
    hf_attn_patch.enable(shards)
    expected = generate(whole, inputs, {}, 8)
    for turn in ("first", "again"):
        known = remembered.any_of(shards)
        torch.testing.assert_close(generate(shards, inputs, {}, 8), expected, rtol=0, atol=0)
        print(f"rank {rank}, {turn}: the same tokens; {graphs.recording_of(shards)}; known {known}")
    for model in (whole, shards):  # what is remembered is of weights that are no longer there
        layer = model.model.layers[0].mlp.down_proj
        layer.weight = torch.nn.Parameter(-layer.weight.detach())
    changed = generate(whole, inputs, {}, 8)
    assert not torch.equal(changed, expected)
    torch.testing.assert_close(generate(shards, inputs, {}, 8), changed, rtol=0, atol=0)


def main(folder: str, kind: str) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        graphs.DEVICES = {kind}
    ids = torch.randint(2, 128, (3, 30), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(device)
    expected = [generate(whole.eval(), inputs, way) for way in WAYS]
    shards = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto").eval()
    assert sum(p.numel() for p in shards.parameters()) == sum(p.numel() for p in whole.parameters())
    hf_attn_patch.enable(shards)
    flown: list[int] = []
    run = flight.Flight.run

    def counted(self: Any) -> Any:
        landing = run(self)
        assert landing.error is None, landing.error
        flown.append(landing.steps)
        return landing

    flight.Flight.run = counted  # type: ignore[method-assign]
    for way, tokens in zip(WAYS, expected, strict=True):
        torch.testing.assert_close(generate(shards, inputs, way), tokens, rtol=0, atol=0)
    assert len(flown) == 3, flown
    print(f"rank {rank}: the same tokens; {graphs.recording_of(shards)}; steps in flight: {flown}")
    in_fewer_kernels(rank, whole, shards, inputs)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
