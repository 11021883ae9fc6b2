"""A model's layers in a row are the model: for every family whose body does no more than that."""

from __future__ import annotations

import pytest
import torch
from tiny_families import tiny_model
from torch import nn

from hf_attn_patch.conversion.calibration.chain import chain_of
from hf_attn_patch.conversion.calibration.polish import Speaker


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi", "mistral", "falcon", "olmo2", "mixtral"])
def test_a_chain_is_the_body(family: str) -> None:
    torch.manual_seed(0)
    speaker = Speaker(tiny_model(family).eval())
    layers = next(m for m in speaker.body.modules() if isinstance(m, nn.ModuleList))
    size = speaker.model.get_input_embeddings().num_embeddings
    sample, ids = (torch.randint(0, size, (rows, 16)) for rows in (2, 3))
    chain = speaker.chain(list(layers), sample)
    assert chain is not None
    torch.testing.assert_close(chain(chain.first(ids)), speaker.hidden(ids), atol=1e-5, rtol=1e-4)


def test_a_body_that_does_more_has_no_chain() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.norm = nn.LayerNorm(4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            first = self.layers[0](self.embed(ids))
            return self.norm(self.layers[1](first) + self.embed(ids))

    body = Body()
    assert chain_of(body, body, list(body.layers), torch.arange(8)[None]) is None
