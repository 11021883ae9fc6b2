"""What a causal objective refuses to learn from."""

import pytest
import torch
from tiny import tiny_llama
from transformers import BertConfig, BertLMHeadModel

from hf_attn_patch.errors import TrainingError
from hf_attn_patch.training.model.objectives import CausalObjective


def checked(model, **options):
    objective = CausalObjective(model.eval(), **options)
    objective.check(objective.check_batch(model.device))
    return objective


def test_attention_that_knows_nothing_of_documents_is_refused(monkeypatch):
    model = tiny_llama(2)
    model.set_attn_implementation("hf_attn_patch")
    objective = checked(model)
    # every document's tokens at the same positions as before, and no borders: one long document
    plain = objective.arguments
    monkeypatch.setattr(objective, "arguments", lambda batch: {k: plain(batch)[k] for k in ("input_ids", "use_cache")})
    with pytest.raises(TrainingError, match="lets packed documents see each other"):
        objective.check(objective.check_batch(model.device))


@pytest.mark.parametrize("packed", [False, True])
def test_what_sees_later_words_is_refused(packed):
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(TrainingError, match="sees the words after a token"):
        checked(BertLMHeadModel(config), packed=packed)
    config.is_decoder = True
    checked(BertLMHeadModel(config), packed=False)


def test_tokens_that_go_to_other_experts_by_rounding_are_no_leak(monkeypatch):
    """A few tokens move, by much; what sees other words moves all."""
    model = tiny_llama(2)
    model.set_attn_implementation("hf_attn_patch")
    objective = CausalObjective(model.eval())
    plain, calls = objective.hidden, []

    def hidden(batch):
        out = plain(batch)
        calls.append(batch)
        return out.index_add(0, torch.tensor([9, 12]), out[[9, 12]] * len(calls))

    monkeypatch.setattr(objective, "hidden", hidden)
    objective.check(objective.check_batch(model.device))
    assert len(calls) == 3
