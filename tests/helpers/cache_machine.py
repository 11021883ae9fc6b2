"""Rules for machines that hold a GrowingCache against a DynamicCache: the same states after any operations."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from cache_states import assert_same, config, states
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache

from hf_attn_patch.cache.growing_cache import GrowingCache


class CacheMachine(RuleBasedStateMachine):
    """Whatever is done to both caches, they hold and return the same."""

    within = 0.0  # how far what they hold may lie apart

    @initialize(B=st.integers(1, 3), growth=st.sampled_from([1.0, 1.25, 2.0]), expected=st.sampled_from([None, 1, 300]))
    def start(self, B: int, growth: float, expected: int | None) -> None:
        self.B = B
        self.ours: Any = GrowingCache(config=config(), growth=growth, expected_length=expected)
        self.theirs: Any = DynamicCache(config=config())
        self.snapshots: list[tuple[torch.Tensor, torch.Tensor]] = []

    def append(self, S: int, grad: bool = False) -> None:
        for layer_idx in range(2):
            k, v = states(self.B, S)
            announced, _ = self.theirs.get_mask_sizes(S, layer_idx)
            with torch.set_grad_enabled(grad):
                ours = self.ours.update(k, v, layer_idx)
                theirs = self.theirs.update(k, v, layer_idx)
            for a, b in zip(ours, theirs, strict=True):
                # transformers 5.17 returns more than its masks cover if the past is recorded over several updates
                torch.testing.assert_close(a, b[:, :, -announced:], rtol=0, atol=0)
                assert a.stride(-1) == 1
                assert a.stride(-2) == a.shape[-1], "the keys of a head must lie one behind the other"

    @rule(S=st.one_of(st.just(1), st.integers(1, 9), st.integers(200, 400)))
    def update(self, S: int) -> None:
        self.append(S)

    @rule(n=st.integers(1, 300))
    def many_tokens(self, n: int) -> None:
        for _ in range(min(n, 40)):
            self.append(1)

    @rule()
    def update_with_gradients_on(self) -> None:
        self.append(2, grad=True)

    @rule(grow=st.integers(1, 8), back=st.integers(0, 8))
    def speculate(self, grow: int, back: int) -> None:
        """What assisted decoding does: record the past, run ahead, take some of it back."""
        for cache in (self.ours, self.theirs):
            cache.activate_past_recording()
        self.append(grow)
        self.append(1)
        for cache in (self.ours, self.theirs):
            cache.crop(-min(back, grow))
        for cache in (self.ours, self.theirs):
            cache.layers[0].record_past = False

    @precondition(lambda self: self.theirs.layers[1].is_initialized)
    @rule(fraction=st.floats(0, 1, exclude_max=True))
    def crop(self, fraction: float) -> None:
        """Far back, as a chat does that returns to an earlier turn; a full window cannot. Not to nothing: transformers
        takes an empty layer for one that has no batch yet."""
        n = int(fraction * self.theirs.layers[1].get_seq_length())
        for cache in (self.ours, self.theirs):
            cache.layers[1].crop(-n)

    @precondition(lambda self: self.theirs.get_seq_length() > 0)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        index = torch.tensor(data.draw(st.lists(st.integers(0, self.B - 1), min_size=self.B, max_size=self.B)))
        self.ours.reorder_cache(index)
        self.theirs.reorder_cache(index)

    @precondition(lambda self: self.B <= 3)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats: int) -> None:
        self.ours.batch_repeat_interleave(repeats)
        self.theirs.batch_repeat_interleave(repeats)
        self.B *= repeats if self.theirs.get_seq_length() else 1

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        if self.theirs.get_seq_length() == 0:
            return
        index = torch.tensor(data.draw(st.lists(st.integers(0, self.B - 1), min_size=1, max_size=3, unique=True)))
        self.ours.batch_select_indices(index)
        self.theirs.batch_select_indices(index)
        self.B = len(index)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "copy the layers"]))
    def replace_by_a_copy(self, how: str) -> None:
        original = self.ours
        if how == "deepcopy":
            self.ours = copy.deepcopy(original)
        elif how == "pickle":
            self.ours = pickle.loads(pickle.dumps(original))
        else:
            self.ours = copy.copy(original)
            self.ours.layers = [copy.copy(layer) for layer in original.layers]
        before = [layer.keys.clone() for layer in original.layers if layer.keys is not None]
        self.append(1)
        after = [layer.keys for layer in original.layers if layer.keys is not None]
        for a, b in zip(before, after, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)

    @rule()
    def trim(self) -> None:
        self.ours.trim()

    @rule()
    def replace_states(self) -> None:
        """As user code does that edits ``layer.keys``."""
        for cache in (self.ours, self.theirs):
            for layer in cache.layers:
                if layer.is_initialized and layer.keys.dim() == 4:
                    layer.keys = layer.keys + 1

    @rule()
    def snapshot(self) -> None:
        """What someone took out of the cache stays as it was, whatever happens to the cache."""
        for layer in self.ours.layers:
            if layer.keys is not None:
                self.snapshots.append((layer.keys, layer.keys.clone()))

    @rule()
    def reset(self) -> None:
        self.ours.reset()
        self.theirs = DynamicCache(config=config())  # 5.17's own reset goes on counting

    @invariant()
    def same(self) -> None:
        if hasattr(self, "ours"):
            assert_same(self.ours, self.theirs, self.within)
            for view, value in self.snapshots:
                torch.testing.assert_close(view, value, rtol=0, atol=0)
