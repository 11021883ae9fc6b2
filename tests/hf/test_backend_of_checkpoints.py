"""A block insists on a backend, and gradient checkpointing computes a part of its forward after the block has ended."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from tiny import tiny_llama

import hf_attn_patch
from hf_attn_patch import use_backend
from hf_attn_patch.attn import plan


@pytest.mark.parametrize("forward_in", ["reference", "torch_sdpa", None])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_computes_again_by_the_backend_that_its_forward_took(
    use_reentrant: bool, forward_in: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward runs outside of the block, as it does in autograd's own threads on a GPU."""
    ran: list[str] = []
    choose = plan.choose

    def watched(request: Any, name: str | None = None) -> Any:
        ran.append(str(name))
        return choose(request, name)

    monkeypatch.setattr(plan, "choose", watched)
    torch.manual_seed(0)
    model = tiny_llama(2).train()
    hf_attn_patch.enable(model)
    ids = torch.arange(20).view(2, 10)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": (torch.arange(10) > torch.tensor([[2], [-1]])).long()}
    model(**inputs).loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.zero_grad()
    plan.forget()
    ran.clear()
    with use_backend(forward_in) if forward_in else contextlib.nullcontext():
        loss = model(**inputs).loss
    plan.forget()  # so that the backward's calls are seen too
    loss.backward()
    assert len(ran) >= 2
    expected = {str(forward_in)} if forward_in else {"None"}
    assert set(ran[-1:]) == expected and (use_reentrant or set(ran) == expected)
    for p, gradient in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)
    loss = model(**inputs).loss  # and the next forward asks nobody
    assert not any("_hf_attn_asked" in vars(module) for module in model.modules())
