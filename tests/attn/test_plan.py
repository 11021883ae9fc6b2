"""A call is decided once: what is remembered, under what, and what is not."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_patch.attn import memo, plan, visibility
from hf_attn_patch.attn.backends import reference
from hf_attn_patch.attn.backends.registry import register
from hf_attn_patch.attn.dispatch import attend
from hf_attn_patch.attn.functional import attention
from hf_attn_patch.attn.request import Operands, kind_of, request_of
from hf_attn_patch.attn.visibility import Dense, Full, Packed, Padded, full, packed
from hf_attn_patch.hf.attention_function import attention_forward

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_is_known() -> Any:
    plan.forget()
    yield
    plan.forget()


def some(B: int = 2, S: int = 6) -> list[Any]:
    """One of each class, with everything that each has."""
    cu = torch.tensor([0, 2, S, B * S])
    first, length = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([S, 2], dtype=torch.int32)
    return [
        full(S, S, True, (2, None), B),
        Padded(B, S, S, True, first=first, length=length, restrict_queries=True),
        packed(B, S, S, cu, cu, S, S, True, (3, None)),
        Dense(B, S, S, mask=torch.rand(B, 1, S, S) < 0.5),
    ]


def layer() -> Any:
    module: Any = torch.nn.Module()
    module.is_causal, module.layer_idx = True, 0
    return module


@pytest.mark.parametrize("which", range(4))
def test_nobody_changes_what_is_kept_with_a_visibility(which: int) -> None:
    seen = some()[which]
    for name in [field.name for field in dataclasses.fields(seen)]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(seen, name, getattr(seen, name))
    mask = seen.dense(CPU)
    assert seen.dense(CPU) is mask and torch.equal(dataclasses.replace(seen).dense(CPU), mask)
    assert dataclasses.replace(seen) != seen  # told apart by what they are: tensors cannot be compared


def test_each_holds_what_it_needs_and_no_more() -> None:
    sizes, band = {"batch", "q_len", "kv_len"}, {"causal", "window", "start", "stop"}
    more = {
        Full: band,
        Padded: band | {"first", "length", "restrict_queries"},
        Packed: band | {"cu_q", "cu_k", "max_q", "max_k", "padding"},
        Dense: {"mask"},
    }
    for seen in some():
        assert {field.name for field in dataclasses.fields(seen)} == sizes | more[type(seen)]


@pytest.mark.parametrize("which", range(4))
def test_what_a_graph_makes_is_not_left_with_what_others_share(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = some()[which]
    monkeypatch.setattr(memo, "capturing", lambda device: True)
    inside = seen.form("x", lambda: torch.zeros(1), CPU)
    monkeypatch.undo()
    outside = seen.form("x", lambda: torch.zeros(1), CPU)
    assert (outside is inside) == (not isinstance(seen, Full))
    assert seen.form("x", lambda: torch.zeros(1), CPU) is outside


@pytest.mark.parametrize("which", range(4))
def test_what_inference_mode_works_out_can_be_trained_with(which: int) -> None:
    seen = some()[which]
    with torch.inference_mode():
        seen.dense(CPU), seen.dead_keys(CPU)
    q = torch.randn(2, 2, 6, 8, requires_grad=True)
    for name in ("reference", None):
        attend(q, q, q, seen, name=name)[0].sum().backward()
    assert q.grad is not None and bool(torch.isfinite(q.grad).all())


def test_both_doors_find_the_same_plan() -> None:
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 9, 8)
    attention(q, k, k, causal=True, scale=0.5)
    plans = list(plan.plans_of_kinds.values())
    attention_forward(layer(), q, k, k, None, scaling=0.5)
    assert len(plans) == 1 and list(plan.plans_of_kinds.values()) == plans
    assert {known.plan for known in plan.plain_calls.values()} == set(plans)


def test_a_growing_cache_asks_the_backends_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    refuses = reference.refuses

    def told(request: Any) -> str | None:
        asked.append(request)
        return refuses(request)

    monkeypatch.setattr(reference, "refuses", told)
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 63, 8)
    for length in range(33, 63):  # the bit length of the work stays the same
        for _ in range(3):
            attention_forward(layer(), q, k[:, :, :length], k[:, :, :length], None, softcap=2.0)
    assert len(asked) == len(plan.plans_of_requests) == 1
    assert len(plan.plans_of_kinds) == len(plan.plain_calls) == 30


def test_the_tables_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_MOST_KINDS", 5)
    k = torch.randn(1, 2, 40, 8)
    for length in range(1, 40):
        attention(k[:, :, :1], k[:, :, :length], k[:, :, :length])
        assert len(plan.plans_of_kinds) <= 5 and len(plan.plain_calls) <= 5


def test_a_new_backend_is_found_by_calls_that_are_known() -> None:
    q = torch.randn(2, 2, 6, 8)
    mine = SimpleNamespace(
        missing=lambda: None, refuses=lambda r: None, run=lambda q, k, v, r, o: (torch.full_like(q, 7.0), None)
    )
    for seen in some():
        before = attend(q, q, q, seen)[0]
        with register("mine", mine, before="torch_sdpa"):
            assert bool((attend(q, q, q, seen)[0] == 7).all())
        torch.testing.assert_close(attend(q, q, q, seen)[0], before)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_plan_serves_every_mask_of_a_kind(data: Any) -> None:
    """Dead keys and NaN in them are the mask's, not the kind's: the plan of one mask must be right for another."""
    B, Sq, Sk = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    q, k, v = torch.randn(B, 4, Sq, 8), torch.randn(B, 2, Sk, 8), torch.randn(B, 2, Sk, 8)
    for dead in data.draw(st.lists(st.integers(0, Sk - 1), min_size=2, max_size=4)):
        mask = torch.ones(B, 1, Sq, Sk, dtype=torch.bool)
        mask[..., :dead] = False
        dirty = v.clone()
        dirty[:, :, :dead] = torch.nan
        found = attention(q, k, dirty, mask=mask)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1))[..., dead:] * 8**-0.5
        wanted = scores.softmax(-1) @ v.repeat_interleave(2, 1)[:, :, dead:]
        torch.testing.assert_close(found, wanted)


@given(Sq=st.integers(1, 20), Sk=st.integers(1, 20), causal=st.booleans(), bias=st.booleans(), weights=st.booleans())
def test_a_kind_names_its_facts(Sq: int, Sk: int, causal: bool, bias: bool, weights: bool) -> None:
    q, k = torch.zeros(2, 4, Sq, 8), torch.zeros(2, 2, Sk, 8)
    added = torch.zeros(1, 1, Sq, Sk) if bias else None
    seen = full(Sq, Sk, causal, (None, None), 2)
    kind = kind_of(q, k, k, 3.0, None, added, 0.0, weights, None, "flex", seen.facts)
    assert (kind.q, kind.k, kind.v, kind.dtype, kind.device) == (q.shape, k.shape, k.shape, q.dtype, q.device)
    assert (kind.softcap, kind.sinks, kind.bias, kind.weights, kind.backend) == (True, False, bias, weights, "flex")
    request = request_of(kind)
    assert (request.causal, request.square, request.rows) == (causal and Sq > 1, Sq == Sk, 2 * Sq if Sq <= 16 else 0)
    assert (request.softcap, request.bias, request.weights, request.windowed) == (True, bias, weights, False)


def test_old_names_answer_and_say_so() -> None:
    with pytest.warns(DeprecationWarning, match="Full, Padded, Packed and Dense"):
        old = visibility.Layout
    assert all(isinstance(seen, old) for seen in some())
    seen = full(1, 1, False, (None, None))
    with pytest.warns(DeprecationWarning, match=r"Operands\.visibility"):
        assert Operands(seen, 1.0).layout is seen
