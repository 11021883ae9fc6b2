"""Calibration sequences with pieces that come again."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_attn_patch.conversion.calibration.copies import APART, SHARE, SPAN, joined_rows, with_copies


@given(st.integers(1, 80), st.integers(1, 40), st.integers(1, 200))
def test_joined_rows_are_the_text_in_order(N: int, S: int, longest: int) -> None:
    rows = joined_rows(torch.arange(N * S).view(N, S), longest)
    assert rows.shape[1] % S == 0 and (rows.shape[1] <= longest or rows.shape[1] == S)
    assert rows.flatten().tolist() == list(range(rows.numel()))
    assert N * S - rows.numel() < rows.shape[1]
    assert len(rows) >= min(N, 16)


@given(st.integers(1, 12), st.integers(2, 3000), st.integers(0, 5))
def test_copies_are_of_earlier_pieces(N: int, S: int, seed: int) -> None:
    """Every token that changed is one of before it, in a run as long as a span, and rows keep what has no copies."""
    ids = torch.arange(N * S).view(N, S)
    changed = with_copies(ids, seed)
    assert torch.equal(ids, torch.arange(N * S).view(N, S))
    assert torch.equal(changed, with_copies(ids, seed))
    with_any = (changed != ids).any(1)
    assert int(with_any.sum()) == (round(SHARE * N) if 4 * S // 1024 and S > 2 * SPAN[1] + APART else 0)
    where = torch.arange(S).expand(N, S)
    found = changed - ids[:, :1]  # the position that each token was copied from
    assert bool(((found >= 0) & (found <= where)).all())
    moved = found != where
    assert bool((where - found)[moved].ge(APART).all())
    assert int(moved.sum(1).max()) <= 4 * S // 1024 * (SPAN[1] - 1)
