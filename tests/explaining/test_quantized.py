"""Models whose linear layers are a quantization package's own: explained by their shapes, as their plain twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor, nn

from hf_attn_patch import explain


class Packed(nn.Module):
    """A linear layer as packages make them: weights as bytes, read by code that shapes alone cannot run."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_buffer("qweight", torch.zeros(plain.in_features // 8, plain.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(plain.in_features, plain.out_features, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("no numbers to unpack")


def packed(model: nn.Module) -> Any:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, Packed(child))
    return model


@pytest.mark.parametrize("training", [False, True])
def test_it_says_what_the_plain_model_runs(training: bool) -> None:
    model = packed(tiny_llama())
    assert str(explain(model, training=training)) == str(explain(tiny_llama(), training=training))
    assert isinstance(model.model.layers[0].self_attn.q_proj, Packed)  # of the copy, not of the model
