"""Small models, padded batches, and what it means that ``unpadded`` computes the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hf_attn_patch import unpadded
from hf_attn_patch.hf.padded_rows import IGNORE

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GQA = {**SIZES, "num_key_value_heads": 2}
BERT = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
GPT2 = GPT2Config(
    vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
)
OPT = OPTConfig(
    vocab_size=64,
    hidden_size=32,
    ffn_dim=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    word_embed_proj_dim=32,
    dropout=0.0,
    init_std=0.2,
    pad_token_id=0,
)
GEMMA3 = Gemma3TextConfig(**GQA, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
MIXTRAL = MixtralConfig(**GQA, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1)
CAUSAL: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GQA)),
    "gemma3": (Gemma3ForCausalLM, GEMMA3),
    "gpt2": (GPT2LMHeadModel, GPT2),
    "opt": (OPTForCausalLM, OPT),
    "mixtral": (MixtralForCausalLM, MIXTRAL),
}
ENCODERS: dict[str, tuple[Any, Any]] = {
    "bert": (BertForMaskedLM, BertConfig(**BERT)),
    "bert tokens": (BertForTokenClassification, BertConfig(**BERT)),
    "roberta": (RobertaForMaskedLM, RobertaConfig(**{**BERT, "pad_token_id": 1})),
}
# rows of S=7: padded on the right, left, left with other lengths, both ways and full
MASKS = {
    "right": [[1] * 5 + [0] * 2, [1] * 2 + [0] * 5, [1] * 7],
    "left": [[0] * 2 + [1] * 5, [0] * 5 + [1] * 2, [1] * 7],
    "both": [[1] * 3 + [0] * 4, [0] * 3 + [1] * 4, [1] * 7, [0] * 7, [0] * 2 + [1] * 3 + [0] * 2],
}


def build(cls: Any, config: Any, attention: str = "hf_attn_patch") -> Any:
    torch.manual_seed(0)
    model = cls._from_config(copy.deepcopy(config), attn_implementation=attention)
    return model.eval()


def batch(side: str, pad: int = 0, labels: bool = True) -> dict[str, torch.Tensor]:
    mask = torch.tensor(MASKS[side])
    torch.manual_seed(2)
    ids = torch.randint(2, 64, mask.shape).where(mask == 1, pad)
    out = {"input_ids": ids, "attention_mask": mask}
    if labels:
        predictor = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
        out["labels"] = ids.where((mask * predictor == 1) & (torch.rand(mask.shape) < 0.8), IGNORE)
    return out


def run(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    """Loss, gradients and the outputs at real tokens."""
    expected, expected_grads = run(model, inputs)
    with unpadded(model, **kwargs):
        output, grads = run(model, inputs)
    torch.testing.assert_close(output.loss, expected.loss)
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: n + m)  # type: ignore[misc]
    real = inputs["attention_mask"] == 1
    for name in ("logits", "last_hidden_state"):
        if name in expected:
            torch.testing.assert_close(output[name][real], expected[name][real], rtol=1e-3, atol=1e-4)
            assert (output[name][~real] == 0).all()
    again, _ = run(model, inputs)  # undone
    torch.testing.assert_close(again.logits, expected.logits)
    return output
