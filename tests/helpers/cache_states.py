"""States to cache, a config with a window, and what it means that two caches hold the same."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma2Config

HKV, D = 2, 4
WINDOW = 6


def states(B: int, S: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, HKV, S, D, dtype=dtype), torch.randn(B, HKV, S, D + 2, dtype=dtype)


def config() -> Gemma2Config:
    """One sliding and one full layer."""
    return Gemma2Config(num_hidden_layers=2, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])


def assert_same(ours: Any, theirs: Any, within: float = 0) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    for layer_idx, (a, b) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        assert a.get_seq_length() == b.get_seq_length(), layer_idx
        assert a.is_sliding == b.is_sliding
        assert a.is_initialized == b.is_initialized
        for query_length in (1, 3):
            sizes = ours.get_mask_sizes(query_length, layer_idx)
            assert sizes == theirs.get_mask_sizes(query_length, layer_idx)
        if b.keys is None:
            assert a.keys is None
        else:
            torch.testing.assert_close(a.keys.flatten(), b.keys.flatten(), rtol=within, atol=within)
            torch.testing.assert_close(a.values.flatten(), b.values.flatten(), rtol=within, atol=within)
