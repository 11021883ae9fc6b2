"""unpadded(): what would not be exact is refused, model by model and call by call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from padded import BERT, CAUSAL, GQA, assert_same, batch, build
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    FalconH1Config,
    FalconH1ForCausalLM,
)

from hf_attn_patch import unpadded


@pytest.mark.parametrize("length", [5, 9])
def test_a_mask_of_another_length_is_transformers_own_matter(length: int) -> None:
    model, inputs = build(*CAUSAL["llama"]), batch("right", labels=False)
    inputs["attention_mask"] = torch.ones(3, length, dtype=torch.long)
    inputs["attention_mask"][0, :2] = 0
    with torch.no_grad():
        expected = model(**inputs).logits
        with unpadded(model):
            torch.testing.assert_close(model(**inputs).logits, expected)


def test_targets_on_padding() -> None:
    model, inputs = build(*CAUSAL["llama"]), batch("left")
    clean = assert_same(model, inputs).loss
    dirty = dict(inputs, labels=inputs["labels"].clone())
    dirty["labels"][0, 2] = 7  # the first real token, which only padding could predict
    with pytest.raises(ValueError, match="1 labels stand on padding"), unpadded(model):
        model(**dirty)
    with unpadded(model, drop_padding_targets=True):
        torch.testing.assert_close(model(**dirty).loss, clean)


@pytest.mark.parametrize(
    ("cls", "config", "attention", "error", "message"),
    [
        (BertForMaskedLM, BertConfig(**BERT), "sdpa", ValueError, "does not compute the same"),
        (
            FalconH1ForCausalLM,
            FalconH1Config(**GQA, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8),
            "sdpa",
            ValueError,
            "does not compute the same",
        ),
        (
            BartModel,
            BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8),
            "sdpa",
            TypeError,
            "BartModel is neither",
        ),
    ],
)
def test_what_would_not_be_exact_is_refused(cls: Any, config: Any, attention: str, error: Any, message: str) -> None:
    model = build(cls, config, attention)
    with pytest.raises(error, match=message):
        unpadded(model)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"logits_to_keep": 2}, "logits_to_keep"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1]] * 3)}, "padding between real tokens"),
        ({"attention_mask": torch.ones(3, 1, 7, 7)}, "2-D"),
        ({"bbox": torch.ones(3, 7, 4)}, "cannot serve bbox"),
    ],
)
def test_calls_that_cannot_be_packed(change: dict[str, Any], message: str) -> None:
    model = build(*CAUSAL["llama"])
    with unpadded(model), pytest.raises(ValueError, match=message):
        model(**{**batch("right", labels=False), **change})


def test_no_model() -> None:
    with pytest.raises(TypeError, match="Linear holds no transformers model"):
        unpadded(torch.nn.Linear(1, 1))
