"""One error to catch: all that a user can cause are of one base, and of the built-in kind that they were before."""

import doctest

import pytest

import hf_attn_patch.conversion
import hf_attn_patch.errors
import hf_attn_patch.training
from hf_attn_patch import HFAttnError


@pytest.mark.parametrize("package", [hf_attn_patch, hf_attn_patch.conversion, hf_attn_patch.training])
def test_public_errors_have_one_base(package):
    errors = [getattr(package, name) for name in package.__all__ if name.endswith("Error")]
    assert errors
    for error in errors:
        assert issubclass(error, HFAttnError)
        assert error is HFAttnError or issubclass(error, ValueError)


def test_the_base_catches_one_of_each():
    import torch

    from hf_attn_patch.conversion import plan
    from hf_attn_patch.training import parse_options

    def causes():
        yield lambda: hf_attn_patch.KVGrouping(8, 3)
        yield lambda: hf_attn_patch.attention(*(torch.zeros(1, heads, 4, 8) for heads in (4, 3, 3)))
        yield lambda: plan("no-such-folder", 2)
        yield lambda: parse_options(["--config", "no-such-file.yaml"])

    for cause in causes():
        with pytest.raises(HFAttnError) as caught:
            cause()
        assert type(caught.value) is not HFAttnError


def test_examples():
    assert doctest.testmod(hf_attn_patch.errors).failed == 0
