"""A GrowingCache whose rows share what they begin with, against DynamicCache: the same after any operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cache_machine import CacheMachine
from cache_states import assert_same
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from hf_attn_patch.cache import beginnings
from hf_attn_patch.cache.shared_prefix import SharedLayer


@pytest.fixture(autouse=True)
def _share_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginnings, "SHARE_FROM", 1)


class SharedMachine(CacheMachine):
    """The same rules, and caches that begin with others; looked at as copies, because looking ends the sharing."""

    @initialize()
    def keep_none(self) -> None:
        self.kept: list[tuple[Any, Any, int]] = []

    @precondition(lambda self: self.theirs.get_seq_length() > 0 and self.B < 5)
    @rule(repeats=st.integers(1, 3), go_on=st.sampled_from(["with the new one", "with the old one"]))
    def share(self, repeats: int, go_on: str) -> None:
        new, expected = self.ours.share(self.B * repeats), copy.deepcopy(self.theirs)
        expected.batch_repeat_interleave(repeats)
        assert any(isinstance(layer, SharedLayer) for layer in new.layers)
        if go_on == "with the new one":
            self.kept.append((self.ours, self.theirs, self.B))
            self.ours, self.theirs, self.B = new, expected, self.B * repeats
        else:
            self.kept.append((new, expected, self.B * repeats))

    @precondition(lambda self: self.kept)
    @rule()
    def back_to_another(self) -> None:
        self.kept.append((self.ours, self.theirs, self.B))
        self.ours, self.theirs, self.B = self.kept.pop(0)

    @precondition(lambda self: self.theirs.get_seq_length() > 0)
    @rule(data=st.data())
    def other_rows(self, data: st.DataObject) -> None:
        """As after a prompt of which some rows were alike."""
        of = data.draw(st.lists(st.integers(0, self.B - 1), min_size=1, max_size=5))
        self.ours.begin_rows(of)
        self.theirs.batch_select_indices(torch.tensor(of))
        self.B = len(of)

    @invariant()
    def same(self) -> None:
        if hasattr(self, "kept"):
            for ours, theirs, _ in [(self.ours, self.theirs, self.B), *self.kept]:
                assert_same(copy.deepcopy(ours), theirs)
            for view, value in self.snapshots:
                torch.testing.assert_close(view, value, rtol=0, atol=0)


TestSharedMachine = SharedMachine.TestCase
TestSharedMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
