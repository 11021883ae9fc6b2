"""What torch.compile says of its own work."""

from __future__ import annotations

import torch

from hf_attn_patch.compat.torch import compile_facts


def test_what_a_compilation_adds() -> None:
    torch._dynamo.reset()
    before = compile_facts()
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager")
    compiled(torch.ones(3))
    once = compile_facts()
    assert once["tracing_seconds"] > before["tracing_seconds"]
    assert once["all_seconds"] - before["all_seconds"] >= once["tracing_seconds"] - before["tracing_seconds"]
    assert once["not_found"] == before["not_found"]  # inductor was not asked
    compiled(torch.ones(3))
    assert compile_facts() == once
