from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_attn_patch.errors import TrainingError
from hf_attn_patch.training.loop.schedule import Count, learning_rate, token_budget


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd", "constant"])
@given(tokens=st.floats(0, 1), warmup=st.floats(0.01, 0.5), floor=st.floats(0, 0.5))
def test_the_rate_rises_to_its_peak_and_falls_to_its_floor(decay, tokens, warmup, floor):
    def rate(share):
        return learning_rate(round(share * 10**6), total=10**6, peak=2.0, warmup=warmup, decay=decay, floor=floor)

    assert 0 <= rate(tokens) <= 2.0 + 1e-9
    assert rate(0) == 0
    assert rate(warmup) == pytest.approx(2.0, abs=1e-3)
    assert rate(1) == pytest.approx(2.0 if decay == "constant" else 2.0 * floor, abs=1e-9)
    if tokens > warmup:
        assert rate(min(1.0, tokens + 0.05)) <= rate(tokens) + 1e-9


def test_halfway_points():
    at = lambda decay, t: learning_rate(t, total=110, peak=1.0, warmup=10 / 110, decay=decay)  # noqa: E731
    assert at("cosine", 60) == pytest.approx(0.5)
    assert at("linear", 35) == pytest.approx(0.75)
    assert at("wsd", 89) == 1.0
    assert at("wsd", 100) == pytest.approx(0.5)


def test_budgets():
    assert token_budget(Count("50M"), None, None) == 50_000_000
    assert token_budget(None, 0.05, Count("2B")) == 100_000_000
    for wrong in ((None, None, None), (Count(1), 0.1, Count(1)), (None, 0.1, None), (None, 0.0, Count(1))):
        with pytest.raises(TrainingError):
            token_budget(*wrong)
    with pytest.raises(TrainingError, match="'many' is not a number of tokens"):
        Count("many")
