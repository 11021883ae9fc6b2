"""Most tests here are about means of heads, written out by hand; those about calibration keep the real default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hf_attn_patch.conversion import methods


@pytest.fixture(autouse=True, scope="module")
def _pooling(request: pytest.FixtureRequest) -> Iterator[None]:
    default = methods.DEFAULT
    if request.path.name not in ("test_refit.py", "test_calibration_text.py", "test_kv_budget.py"):
        methods.DEFAULT = "mean"
    yield
    methods.DEFAULT = default
