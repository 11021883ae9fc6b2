"""The examples in the docstrings of hf_attn_patch.training, run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import hf_attn_patch.training


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(hf_attn_patch.training.__path__)])
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"hf_attn_patch.training.{name}"))
    assert result.failed == 0
