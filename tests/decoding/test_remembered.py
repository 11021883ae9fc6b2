"""Steps in fewer kernels that the next call uses again, while the code is the same, without writing them down."""

from __future__ import annotations

import interpreter  # isort: skip - before the kernels
import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from decoding import SIZES, batch, generate
from transformers.models.llama import modeling_llama

import hf_attn_patch
from hf_attn_patch.attn import ladder, plan
from hf_attn_patch.cache import beginnings
from hf_attn_patch.compat.calls import generate_keyword
from hf_attn_patch.decoding import cuda_graphs as graphs
from hf_attn_patch.decoding import fusing, remembered, step

pytestmark = pytest.mark.skipif(interpreter.DEVICE == "cuda", reason="tests/gpu has the same on a GPU")
TOKENS = 4


class Written:
    """Counts the steps that are written down."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Any:
        self.times += 1
        return TAPE()


TAPE = step.Tape


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[Written]:
    count = Written()
    monkeypatch.setattr(step, "Tape", count)
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    monkeypatch.setattr(step, "FUSED_SHORT", 0)
    monkeypatch.setattr(step, "SHORT", 0)
    monkeypatch.setattr("hf_attn_patch.decoding.generating.SHORT", 0)
    monkeypatch.setattr(ladder, "_CPU", ("triton_decode", *(n for n in ladder._CPU if n != "triton_decode")))
    plan.forget()
    yield count
    plan.forget()


def llama(**others: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 1, **others})
    return hf_attn_patch.enable(transformers.LlamaForCausalLM(config).eval())


def plain(model: Any, inputs: Any, tokens: int = TOKENS) -> torch.Tensor:
    """The tokens of a copy of the model that records nothing, by the formula of attention."""
    other = hf_attn_patch.enable(copy.deepcopy(model), cuda_graphs=False)
    with hf_attn_patch.use_backend("reference"):
        return generate(other, inputs, max_new_tokens=tokens)


def same(model: Any, inputs: Any) -> None:
    found = generate(model, inputs, max_new_tokens=TOKENS)
    torch.testing.assert_close(found, plain(model, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt_neox"])
def test_models_from_files_are_remembered_too(model_type: str, written: Written, tmp_path: Path) -> None:
    """``from_pretrained`` leaves with a model how its weights were renamed, where they were."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 1, "num_local_experts": 2}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = hf_attn_patch.enable(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    )
    for length in (30, 41):
        same(model, batch("cpu", 3, length))
    assert written.times == 1


def test_later_calls_write_nothing_down(written: Written) -> None:
    model = llama()
    for length in (30, 41, 60):  # the cache has room for 256 in each
        same(model, batch("cpu", 3, length))
    assert written.times == 1
    told = fusing.told[model]
    assert not isinstance(told, str)
    assert told["norms"] == 3
    for rows in (2, 3):
        same(model, batch("cpu", rows, 37))
        assert written.times == 2  # two rows have a step of their own


def test_loops_of_ones_own_have_them_too(written: Written) -> None:
    model = llama()
    ids = batch("cpu", 2, 9, padded=False)["input_ids"]
    found = []
    with torch.no_grad():
        for _ in range(2):
            cache = hf_attn_patch.GrowingCache(config=model.config)
            model(ids[:, :4], past_key_values=cache)
            found.append(torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(4, 9)], 1))
        expected = hf_attn_patch.enable(model, cuda_graphs=False)(ids).logits[:, 4:]
    assert written.times == 1
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


def attribute(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[0].post_attention_layernorm.variance_epsilon = 3.0


def config(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.config.hidden_act = "no matter, but who knows"


def weight(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * -2)


def module(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()


def function(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *a, **b: own(q * 3, k, *a, **b))


def of_the_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: own(self, x) * 3)


def of_the_instance(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) * 3


CHANGES = [attribute, config, weight, module, function, of_the_class, of_the_instance]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_calls_is_seen(change: Any, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llama(), batch("cpu", 2, 7)
    same(model, inputs)
    change(model, monkeypatch)
    same(model, inputs)
    assert written.times == 2


@pytest.mark.once
def test_what_changes_while_a_cache_is_kept_is_seen(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call brings one token, as a step of the first one did."""
    model, inputs = llama(), batch("cpu", 1, 8)
    cache = hf_attn_patch.GrowingCache(config=model.config)
    with torch.no_grad():
        model(inputs["input_ids"][:, :7], **{generate_keyword(): cache})
    generate(model, inputs, max_new_tokens=TOKENS, **{generate_keyword(): cache})
    cache.crop(7 - cache.get_seq_length())
    weight(model, monkeypatch)
    kept = copy.deepcopy(cache)
    other = hf_attn_patch.enable(copy.deepcopy(model), cuda_graphs=False)
    found = generate(model, inputs, max_new_tokens=TOKENS, **{generate_keyword(): cache})
    expected = generate(other, inputs, max_new_tokens=TOKENS, **{generate_keyword(): kept})
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_weights_written_in_place_are_read(written: Written) -> None:
    model, inputs = llama(), batch("cpu", 2, 7)
    same(model, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    same(model, inputs)
    assert written.times == 1


@pytest.mark.once
def test_adapters_that_are_switched(written: Written) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = llama(), batch("cpu", 2, 7)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["up_proj"], lora_alpha=800, init_lora_weights=False)
    )
    tokens = []
    for on in (True, False, True):
        for layer in (m for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)):
            layer.enable_adapters(on)
        tokens.append(generate(model, inputs, max_new_tokens=TOKENS))
        torch.testing.assert_close(tokens[-1], plain(model, inputs), rtol=0, atol=0)
    assert not torch.equal(*tokens[:2])
    assert written.times == 3


class Switched(torch.nn.Module):
    """Code of somebody's own, which reads what stands nowhere in the model."""

    on = False

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * (3 if Switched.on else 1)


@pytest.mark.once
def test_code_of_ones_own_is_written_down_for_each_call(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llama(), batch("cpu", 2, 7)
    model.model.layers[0].mlp = Switched(model.model.layers[0].mlp)
    same(model, inputs)
    before = written.times
    monkeypatch.setattr(Switched, "on", True)
    same(model, inputs)
    assert written.times > before
    assert not isinstance(fusing.told[model], str)


@pytest.mark.once
def test_what_cannot_be_written_down_is_not_tried_again(written: Written) -> None:
    model, inputs = llama(), batch("cpu", 2, 7)
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) * (1 if x.sum().item() < torch.inf else 2)
    same(model, inputs)
    told = fusing.told[model]
    assert isinstance(told, str)
    for length in (7, 300):  # in other buffers too
        same(model, batch("cpu", 2, length))
        assert (written.times, fusing.told[model]) == (1, told)


@pytest.mark.once
def test_calls_and_models_are_let_go(written: Written) -> None:
    model = llama()
    out = model.generate(**batch("cpu", 2, 7), max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    buffer = weakref.ref(cache.layers[0]._held().buffers[0])
    assert remembered.any_of(model)
    del out, cache
    gc.collect()
    assert buffer() is None
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


@pytest.mark.once
def test_not_more_than_a_few_are_kept(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST", 2)
    model = llama()
    for rows in (1, 2, 3, 2, 1):
        same(model, batch("cpu", rows, 7))
    assert written.times == 4


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_shared_prompt_has_fewer_kernels_too(padded: bool, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beginnings, "SHARE_FROM", 1)
    model = llama()
    for seed in (0, 1):
        ids = torch.randint(2, 128, (2, 30), generator=torch.Generator().manual_seed(seed)).repeat_interleave(3, 0)
        mask = torch.ones_like(ids)
        mask[:3, :11] = int(not padded)
        inputs = {"input_ids": ids, "attention_mask": mask}
        found = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True)
        assert found.past_key_values.layers[0].shared
        torch.testing.assert_close(found.sequences, plain(model, inputs), rtol=0, atol=0)
        told = fusing.told[model]
        assert not isinstance(told, str), told
        assert told["norms"] == 3
    assert written.times == 1


@pytest.mark.once
def test_short_calls_have_what_a_long_one_wrote_down(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llama(), batch("cpu", 2, 30)
    monkeypatch.setattr(step, "FUSED_SHORT", 5)
    for tokens, times in ((4, 0), (7, 1), (4, 1)):
        found = generate(model, inputs, max_new_tokens=tokens)
        torch.testing.assert_close(found, plain(model, inputs, tokens), rtol=0, atol=0)
        assert written.times == times


def tokens_of(model: Any, inputs: Any, **how: Any) -> torch.Tensor:
    found = model.generate(**inputs, do_sample=False, max_new_tokens=12, **how)
    assert isinstance(found, torch.Tensor)
    return found


def test_the_first_token_may_be_the_last(written: Written) -> None:
    """A remembered step is made ready before the host has seen the prompt's token."""
    model, inputs = llama(), batch("cpu", 2, 30)
    other = hf_attn_patch.enable(copy.deepcopy(model), cuda_graphs=False)
    free = tokens_of(model, inputs)
    ends = {"first": free[:, 30].tolist(), "one row's first": free[:1, 30].tolist(), "later": free[:, 35].tolist()}
    for name, eos in ends.items():
        found = tokens_of(model, inputs, eos_token_id=eos)
        assert torch.equal(found, tokens_of(other, inputs, eos_token_id=eos)), name
    assert tokens_of(model, inputs, eos_token_id=ends["first"]).shape[1] == 31
    assert written.times == 1


@pytest.mark.parametrize("guess", [(), ("position_ids", "input_ids"), ("position_ids", "logits_to_keep")], ids=str)
def test_a_wrong_guess_of_what_moves_is_found(
    guess: tuple[str, ...], written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = llama(), batch("cpu", 2, 30)
    expected = tokens_of(model, inputs)
    right = remembered._known[model].moving
    assert [*right.values()] == [("position_ids",)]
    monkeypatch.setattr(remembered, "moving_of", lambda *_: guess)
    found = tokens_of(model, inputs)
    assert torch.equal(found, expected)
