"""Most tests here are about means of heads, written out by hand; test_refit.py keeps the real default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hf_attn_patch.conversion import methods


@pytest.fixture(autouse=True, scope="module")
def _pooling(request: pytest.FixtureRequest) -> Iterator[None]:
    default = methods.DEFAULT
    if request.path.name != "test_refit.py":
        methods.DEFAULT = "mean"
    yield
    methods.DEFAULT = default
