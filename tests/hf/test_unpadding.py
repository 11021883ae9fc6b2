"""unpadded(): a padded batch without its padding computes the same outputs, loss and gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance import assert_conforms
from hypothesis import given, settings
from hypothesis import strategies as st
from padded import BERT, CAUSAL, ENCODERS, GQA, MASKS, assert_same, batch, build, run
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    RobertaForSequenceClassification,
    RobertaModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_attn_patch import unpadded
from hf_attn_patch.hf.padded_rows import IGNORE


def packed_reference(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """What an implementation that takes document borders promises, the slow way: one document at a time."""
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None:
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)  # type: ignore[no-any-return]
    assert mask is None
    assert isinstance(kwargs["max_length_q"], int)
    assert kwargs["max_length_q"] == int(borders.diff().max())
    assert int(borders[-1]) == q.shape[2]
    causal = kwargs.get("is_causal")
    causal = module.is_causal if causal is None else causal
    out = []
    for start, end in borders.unfold(0, 2, 1).tolist():
        n = end - start
        visible = torch.ones(n, n, dtype=torch.bool).tril() if causal else torch.ones(n, n, dtype=torch.bool)
        if kwargs.get("sliding_window"):
            visible &= torch.ones(n, n, dtype=torch.bool).triu(1 - kwargs["sliding_window"])
        a, b, c = (t[:, :, start:end] for t in (q, k, v))
        out.append(
            scaled_dot_product_attention(a, b, c, attn_mask=visible, scale=kwargs.get("scaling"), enable_gqa=True)
        )
    return torch.cat(out, dim=2).transpose(1, 2), None


def packed_reference_mask(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    AttentionInterface.register("packed_reference", packed_reference)
    AttentionMaskInterface.register("packed_reference", packed_reference_mask)
    yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("packed_reference")


@pytest.mark.parametrize("attention", ["hf_attn_patch", "packed_reference", "sdpa", "eager"])
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("family", CAUSAL)
def test_causal(family: str, side: str, attention: str) -> None:
    """transformers' own masks find the borders by position_ids; the others are given them."""
    cls, config = CAUSAL[family]
    model = build(cls, config, attention)
    if family == "opt" and attention in ("sdpa", "eager"):  # OPT makes its mask without position_ids
        with pytest.raises(ValueError, match="does not compute the same"):
            unpadded(model)
    else:
        assert_same(model, batch(side))


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("attention", ["hf_attn_patch", "packed_reference"])
def test_encoders(attention: str, family: str, side: str) -> None:
    cls, config = ENCODERS[family]
    inputs = batch(side, config.pad_token_id)
    if family == "bert tokens":
        inputs["labels"] = inputs["labels"].where(inputs["labels"] == IGNORE, inputs["labels"] % 3)
        inputs["token_type_ids"] = inputs["input_ids"] % 2
    assert_same(build(cls, config, attention), inputs)


def test_the_padding_is_really_gone() -> None:
    model, seen = build(*CAUSAL["llama"]), []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    with unpadded(model, check=False):
        model(**batch("right"))
    hook.remove()
    assert seen == [(1, 14, 32)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_sequence_classification_gets_padded_hidden_states(side: str) -> None:
    """A head that is not per token: it picks its token in the padded batch."""
    assert_rows_same(build(LlamaForSequenceClassification, LlamaConfig(**GQA, num_labels=3)), side)


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (BertForSequenceClassification, BertConfig(**BERT)),  # has a pooler
        (RobertaForSequenceClassification, ENCODERS["roberta"][1]),  # the head reads the first state itself
    ],
)
def test_pooler(cls: Any, config: Any, side: str) -> None:
    """Padded on the left, the first state is padding's: it had been replaced by zeros, and every row got one answer."""
    assert_rows_same(build(cls, config), side)
    model, seen = build(cls, config), []
    hook = model.base_model.encoder.layer[0].output.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    with unpadded(model, check=False), torch.no_grad():
        model(**batch(side, config.pad_token_id, labels=False))
    hook.remove()
    assert seen == [1 if side == "right" else len(MASKS[side])]
    with pytest.raises(ValueError, match="does not compute the same"):  # is tried out all the same
        unpadded(build(cls, config, "sdpa"))


def assert_rows_same(model: Any, side: str) -> None:
    inputs = batch(side, model.config.pad_token_id, labels=False)
    inputs["labels"] = torch.tensor([0, 2, 1, 0, 1])[: len(inputs["input_ids"])]
    expected, expected_grads = run(model, inputs)
    with unpadded(model):
        output, grads = run(model, inputs)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-3, atol=1e-4)
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_base_models_and_hidden_states(as_tuple: bool) -> None:
    for cls, config in (
        (LlamaModel, LlamaConfig(**GQA)),
        (BertModel, BertConfig(**BERT)),
        (RobertaModel, ENCODERS["roberta"][1]),
    ):
        model, inputs = build(cls, config), batch("right", config.pad_token_id, labels=False)
        call = {**inputs, "output_hidden_states": True, "return_dict": not as_tuple, "use_cache": False}
        real = inputs["attention_mask"] == 1
        with torch.no_grad():
            expected = model(**call)
            with unpadded(model):
                output = model(**call)
        assert type(output) is type(expected)
        assert len(output) == len(expected)
        for a, b in zip((output[0], *output[-1]), (expected[0], *expected[-1]), strict=True):
            torch.testing.assert_close(a[real], b[real], rtol=1e-3, atol=1e-4)
        if cls is not LlamaModel:
            torch.testing.assert_close(output[1], expected[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", ["hf_attn_patch", "sdpa"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_mask(attention: str, data: st.DataObject) -> None:
    S = data.draw(st.integers(2, 9))
    spans = data.draw(st.lists(st.tuples(st.integers(0, S), st.integers(0, S)), min_size=1, max_size=4))
    mask = torch.zeros(len(spans), S, dtype=torch.long)
    for row, (a, b) in enumerate(spans):
        mask[row, min(a, b) : max(a, b)] = 1
    model, ids = build(*CAUSAL["llama"], attention), torch.randint(2, 64, mask.shape)
    with torch.no_grad(), unpadded(model, check=False):
        output = model(input_ids=ids, attention_mask=mask).logits
    if mask.sum() in (0, mask.numel()):
        return
    for row in range(len(spans)):  # each document by itself
        real = mask[row] == 1
        assert (output[row][~real] == 0).all()
        if real.any():
            with torch.no_grad():
                alone = model(input_ids=ids[row][real][None]).logits[0]
            torch.testing.assert_close(output[row][real], alone, rtol=1e-3, atol=1e-4)


def test_inputs_embeds_and_positions_of_the_user() -> None:
    model, inputs = build(*CAUSAL["llama"]), batch("left")
    inputs["position_ids"] = inputs["attention_mask"].cumsum(1).sub(1).clamp(min=0) * 3  # not by ones
    assert_same(model, inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    inputs["inputs_embeds"] = embeds
    model(**inputs).loss.backward()
    expected = embeds.grad.clone()
    embeds.grad = None
    with unpadded(model):
        model(**inputs).loss.backward()
    torch.testing.assert_close(embeds.grad, expected, rtol=1e-3, atol=2e-5)
    strict = build(*CAUSAL["llama"], "sdpa")
    with pytest.raises(ValueError, match="position_ids do not count"), unpadded(strict):
        strict(**inputs)


def test_num_items_and_shift_labels() -> None:
    model, inputs = build(*CAUSAL["llama"]), batch("right")
    assert_same(model, {**inputs, "num_items_in_batch": torch.tensor(29)})
    shifted = torch.cat([inputs["labels"][:, 1:], torch.full((3, 1), IGNORE)], dim=1)
    assert_same(model, {**inputs, "shift_labels": shifted})


def test_gradient_checkpointing() -> None:
    model = build(*CAUSAL["llama"])
    model.gradient_checkpointing_enable()
    assert_same(model.train(), batch("right"))
    assert model.training


@pytest.mark.gpu
@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**{**GQA, "hidden_size": 256})),
        (BertForMaskedLM, BertConfig(**{**BERT, "hidden_size": 256})),
    ],
    ids=["llama", "bert"],
)
def test_in_bf16_on_a_gpu(cls: Any, config: Any, side: str) -> None:
    """No further from fp32 than plain attention on the padded batch; gradients finite where padding was."""
    inputs = {name: t.repeat_interleave(40, 1).cuda() for name, t in batch(side).items()}
    inputs["labels"][:, 1:][inputs["attention_mask"][:, :-1] == 0] = IGNORE
    config = copy.deepcopy(config)
    config.max_position_embeddings = 512
    real = inputs["attention_mask"] == 1
    model = build(cls, config, "eager").cuda()
    reference, high = run(model, inputs)
    model = model.to(torch.bfloat16)
    plain, low = run(model, inputs)
    model.set_attn_implementation("hf_attn_patch")
    with unpadded(model):
        found, grads = run(model, inputs)
    assert_conforms(found.logits[real], plain.logits[real], reference.logits[real])
    for name in grads:
        assert_conforms(grads[name], low[name], high[name], factor=3)


def test_wrapped_and_copied_models() -> None:
    """PEFT around it, torch.compile around it, a deep copy with its own hooks."""
    inputs, seen = batch("right"), []
    adapted = get_peft_model(build(*CAUSAL["llama"]), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    compiled: Any = torch.compile(build(*CAUSAL["llama"]), backend="eager")
    for wrapped in (adapted, compiled):
        expected = wrapped(**inputs)
        hooks = [
            m.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape[:2])))
            for m in wrapped.modules()
            if type(m).__name__ == "LlamaMLP"
        ]
        with unpadded(wrapped):
            seen.clear()
            torch.testing.assert_close(wrapped(**inputs).loss, expected.loss)
            assert seen == [(1, 14), (1, 14)]
        for hook in hooks:
            hook.remove()
    model = build(*CAUSAL["llama"])
    expected = model(**inputs)
    with unpadded(model):
        twin = copy.deepcopy(model)
    seen.clear()
    twin.model.layers[0].mlp.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape[:2])))
    torch.testing.assert_close(twin(**inputs).loss, expected.loss)
    assert seen == [(1, 14)]  # the copy is still unpadded, the original no more
    assert not model._forward_hooks
