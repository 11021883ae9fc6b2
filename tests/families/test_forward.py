"""Every family, every padding: outputs and gradients are eager's, in fp32, on the rows that hold a token."""

from __future__ import annotations

import pytest
from families import FAMILIES, families
from family_inputs import PADDINGS, make_inputs, takes_padding
from family_runs import assert_close, counted, gradients, pair, run

_CASES = [(name, padding) for name in families() for padding in PADDINGS if takes_padding(FAMILIES[name], padding)]


@pytest.mark.parametrize(("name", "padding"), _CASES, ids=[f"{name}-{padding}" for name, padding in _CASES])
def test_forward_and_gradients_are_eagers(name: str, padding: str) -> None:
    family = FAMILIES[name]
    ours, eager = pair(name)
    inputs = make_inputs(family, padding)
    with counted() as calls:
        found = run(ours, inputs)
    assert len(set(calls)) == family.calls, "not every attention module went through the implementation"
    wanted = run(eager, inputs)
    assert_close(found, wanted)
    assert_close(gradients(ours, found), gradients(eager, wanted), rtol=2e-5)
