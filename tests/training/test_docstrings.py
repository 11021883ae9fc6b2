"""The examples in the docstrings of hf_attn_patch.training, run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import hf_attn_patch.training


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(hf_attn_patch.training.__path__, "hf_attn_patch.training.")]
)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
