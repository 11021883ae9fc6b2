"""Somebody else's backend: registered, chosen, listed, and gone again; what breaks the contract is refused at once."""

from __future__ import annotations

import doctest
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import hf_attn_patch
from hf_attn_patch import AttentionError
from hf_attn_patch.attn import ladder
from hf_attn_patch.attn.backends import base, registry
from hf_attn_patch.attn.request import request_for
from hf_attn_patch.cli import main


class Sevens:
    """A backend that is not a module, and that gives what no other would."""

    def __init__(self, most: int = 8) -> None:
        self.most = most
        self.seen: list[Any] = []

    def missing(self) -> str | None:
        return None

    def refuses(self, request: Any) -> str | None:
        return None if request.head_dim <= self.most else f"takes head_dim up to {self.most}"

    def run(self, q: Tensor, k: Tensor, v: Tensor, request: Any, operands: Any) -> tuple[Tensor, None]:
        self.seen.append(request)
        return torch.full((*q.shape[:-1], v.shape[-1]), 7.0), None


def attend(dim: int = 8, **options: Any) -> Tensor:
    q = torch.ones(1, 4, 3, dim)
    out = hf_attn_patch.attention(q, q[:, :2], q[:, :2], **options)
    assert isinstance(out, Tensor)
    return out


def test_ours_keep_the_contract() -> None:
    for name in registry.BACKENDS:
        assert isinstance(registry.backend(name), base.Backend)


def test_it_is_asked_for_by_name_and_tried_in_its_place() -> None:
    before = attend()
    sevens = Sevens()
    with registry.register("sevens", sevens):
        assert attend().eq(before).all()  # before the reference, which comes after torch's on a CPU
        assert attend(backend="sevens").eq(7).all()
        with hf_attn_patch.use_backend("sevens"):
            assert attend().eq(7).all()
        with pytest.raises(AttentionError, match="'sevens' cannot run this exactly: takes head_dim up to 8"):
            attend(16, backend="sevens")
    assert attend().eq(before).all()
    with pytest.raises(AttentionError, match="there is no backend 'sevens'"):
        attend(backend="sevens")
    assert {request.head_dim for request in sevens.seen} == {8}


def test_what_was_chosen_before_is_chosen_anew() -> None:
    before = attend()
    handle = registry.register("sevens", Sevens(), before="torch_sdpa")
    assert attend().eq(7).all()
    assert attend(16).ne(7).all()  # which it refuses
    handle.undo()
    assert attend().eq(before).all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_order_has_it_once_right_before_the_one_named(device: str) -> None:
    requests = [
        request_for(1, 4, 2, q_len, 64, 8)._replace(device=device, grad=grad, bias=bias)
        for q_len in (1, 64) for grad in (False, True) for bias in (False, True)
    ]  # fmt: skip
    with registry.register("a", Sevens(), before="flex"), registry.register("b", Sevens(), before="a"):
        for request in requests:
            found = ladder.order(request)
            assert len(found) == len(set(found)) == len(registry.names()) == len(registry.BACKENDS) + 2
            place = found.index("flex")
            assert found[place - 2 : place] == ("b", "a")


def test_one_that_others_stand_before_can_go_first() -> None:
    first = registry.register("a", Sevens(), before="flex")
    with registry.register("b", Sevens(), before="a"):
        first.undo()
        found = ladder.order(request_for(1, 4, 2, 64, 64, 8))
        assert found[found.index("flex") - 1] == "b"


def test_env_and_explain_list_it() -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, intermediate_size=32, vocab_size=64)
    with registry.register("sevens", Sevens(4), before="torch_sdpa"):
        found = CliRunner().invoke(main, ["env", "--json"])
        assert json.loads(found.output)["backends"]["sevens"] is None
        assert "takes head_dim up to 4" in str(hf_attn_patch.explain(config))
    assert "sevens" not in str(hf_attn_patch.explain(config))
    assert "sevens" not in CliRunner().invoke(main, ["env"]).output


def test_what_is_no_backend_is_refused() -> None:
    with pytest.raises(AttentionError, match="there is a backend 'flex' already"):
        registry.register("flex", Sevens())
    with pytest.raises(AttentionError, match="there is no backend 'nothing'"):
        registry.register("sevens", Sevens(), before="nothing")
    half: Any = SimpleNamespace(run=print, missing=None)
    with pytest.raises(AttentionError, match="backend 'half' has no function missing, refuses"):
        registry.register("half", half)
    assert registry.names() == registry.BACKENDS


def test_examples() -> None:
    assert doctest.testmod(registry).failed == 0
