"""The rule that kernels are held to, itself."""

from __future__ import annotations

import pytest
import torch
from conformance import assert_conforms


@pytest.mark.parametrize(("dtype", "spacing"), [(torch.float16, 2**-9), (torch.bfloat16, 2**-6)])
def test_luck_of_plain_pytorch_is_no_measure(dtype, spacing):
    """Between 2 and 4 numbers of fp16 are 2**-9 apart, of bf16 2**-6: one of them next to the right one is no fault."""
    ref = torch.tensor([2.5, 1.0])
    low = ref.to(dtype)  # without any error
    assert_conforms((ref + torch.tensor([spacing, 0])).to(dtype), low, ref)
    with pytest.raises(AssertionError, match="is over"):
        assert_conforms((ref + torch.tensor([4 * spacing, 0])).to(dtype), low, ref)


def test_nothing_is_forgiven_where_values_are_small():
    ref = torch.tensor([2e-3, 1e-3])
    with pytest.raises(AssertionError, match="is over"):
        assert_conforms((ref + 1e-3).half(), ref.half(), ref)
