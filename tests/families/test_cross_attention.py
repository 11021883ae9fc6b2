"""Cross-attention with a padded encoder, for every order of the lengths (transformers' flash path fails, #35032)."""

from __future__ import annotations

import pytest
from families import FAMILIES, families
from family_inputs import make_inputs
from family_runs import assert_close, gradients, pair, run


@pytest.mark.parametrize("S_decoder", [1, 4, 12, 19], ids=lambda n: f"Sq{n}")
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("name", families("encoder-decoder"))
def test_cross_attention_over_a_padded_encoder(name: str, padding: str, S_decoder: int) -> None:
    ours, eager = pair(name)
    inputs = make_inputs(FAMILIES[name], padding, S=12, S_decoder=S_decoder)
    # the decoder itself is not padded here: its lengths are what varies
    del inputs.kwargs["decoder_attention_mask"]
    inputs.kwargs["decoder_input_ids"].clamp_(min=10)
    inputs.rows["logits"] = None
    found, wanted = run(ours, inputs), run(eager, inputs)
    assert_close(found, wanted)
    assert_close(gradients(ours, found), gradients(eager, wanted), rtol=2e-5)
