"""A GrowingCache of codes against one that was given numbers rounded to them: the same after any operations.

What both hold: for the cache of codes the numbers that its codes stand for, and for the other, a plain DynamicCache,
what this file rounded itself before it was cached.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_machine import CacheMachine
from cache_states import config, states
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from rounded import decided, rounded
from transformers import DynamicCache

from hf_attn_patch.cache import beginnings
from hf_attn_patch.cache.growing_cache import GrowingCache


class CodedMachine(CacheMachine):
    """The same rules; the other cache is given rounded states, and edits of states are not made (they round again)."""

    kind, within = "int8", 1e-6

    @initialize(B=st.integers(1, 3), growth=st.sampled_from([1.0, 1.25, 2.0]), expected=st.sampled_from([None, 1, 300]))
    def start(self, B: int, growth: float, expected: int | None) -> None:
        self.B = B
        self.ours: Any = GrowingCache(config=config(), dtype=self.kind, growth=growth, expected_length=expected)
        self.theirs: Any = DynamicCache(config=config())
        self.snapshots: list[tuple[torch.Tensor, torch.Tensor]] = []

    def append(self, S: int, grad: bool = False) -> None:
        for layer_idx in range(2):
            k, v = (decided(t, codes) for t, codes in zip(states(self.B, S), ("int8", self.kind), strict=True))
            first = self.theirs.layers[layer_idx].get_seq_length() == 0
            announced, _ = self.theirs.get_mask_sizes(S, layer_idx)
            with torch.set_grad_enabled(grad):
                ours = self.ours.update(k, v, layer_idx)
                theirs = self.theirs.update(rounded(k, "int8"), rounded(v, self.kind), layer_idx)
            if first:  # a prompt attends to what it has in hand
                assert ours[0] is k
                assert ours[1] is v
                continue
            for a, b in zip(ours, theirs, strict=True):
                assert a.shape == b[:, :, -announced:].shape
                torch.testing.assert_close(a + 0, b[:, :, -announced:], rtol=1e-6, atol=1e-6)

    @rule()
    def replace_states(self) -> None:
        """Whoever edits ``layer.keys`` gets what the codes of the edited keys stand for."""
        for layer, other in zip(self.ours.layers, self.theirs.layers, strict=True):
            if other.is_initialized and other.keys.dim() == 4:
                layer.keys = layer.keys * 2
                other.keys = other.keys * 2

    @precondition(lambda self: self.theirs.get_seq_length() > 0 and self.B < 5)
    @rule(repeats=st.integers(1, 3))
    def share(self, repeats: int) -> None:
        self.ours = self.ours.share(self.B * repeats)
        self.theirs.batch_repeat_interleave(repeats)
        self.B *= repeats


class FP8Machine(CodedMachine):
    kind = "fp8"


TestCodedMachine = CodedMachine.TestCase
TestFP8Machine = FP8Machine.TestCase
for case in (TestCodedMachine, TestFP8Machine):
    case.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
del case  # or pytest would find it, too


@pytest.fixture(autouse=True)
def _share_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginnings, "SHARE_FROM", 1)
