"""``explain`` against what runs: every family's dispatch is recorded in a real forward, and compared."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch
import transformers
from families import FAMILIES, families
from family_inputs import make_inputs, takes_padding
from family_runs import build
from tiny import tiny_llama
from zoo_cases import BY_NAME

import hf_attn_patch
from hf_attn_patch import AttentionError, explain
from hf_attn_patch.attn import dispatch, plan
from hf_attn_patch.attn.backends import registry


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, str]]]:
    """(request, backend) of every call that real tensors make, as the backends themselves see them."""
    seen: list[tuple[Any, str]] = []
    with monkeypatch.context() as patch:
        for name in registry.BACKENDS:
            module = registry.backend(name)

            def run(*args: Any, name: str = name, run: Any = module.run) -> Any:  # q, k, v, request, operands
                seen.append((args[3], name))
                return run(*args)

            patch.setattr(module, "run", run)
            if hasattr(module, "shorter"):
                patch.setattr(module, "shorter", lambda request, layout: None)
        plan.forget()
        yield seen
    plan.forget()


def asked(explanation: Any) -> Counter[Any]:
    """(request, backend) -> calls."""
    found: Counter[Any] = Counter()
    for kind in explanation.kinds:
        found[(kind.request, kind.chosen)] += kind.calls
    return found


def _numpy_state() -> Any:
    state: Any = numpy.random.get_state()
    return state[1]


def forward(model: Any, training: bool, **inputs: Any) -> Any:
    model.train(training)
    with torch.set_grad_enabled(training):
        return model(**inputs)


def calls() -> Iterator[Any]:
    """(family, padding, training): each padding and each mode of every family once, all pairs with -m slow."""
    for name, family in FAMILIES.items():
        padded = [padding for padding in ("left", "right") if takes_padding(family, padding)]
        for padding, training in itertools.product(("none", *padded), (False, True)):
            often = training == (padding == "left") or not padded
            yield pytest.param(name, padding, training, marks=[] if often else pytest.mark.slow)


@pytest.mark.parametrize(("name", "padding", "training"), calls())
def test_it_says_what_a_call_runs(name: str, padding: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    model = build(name, "hf_attn_patch").train(training)
    inputs = make_inputs(family, padding).kwargs
    said = explain(model, inputs=inputs, training=training)
    assert said.unasked == ()
    with recorded(monkeypatch) as seen:
        forward(model, training, **inputs)
    assert asked(said) == Counter(seen)


def tokens(model: Any, B: int, S: int, padded: bool, *, left: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ids, mask), both [B, S]; a quarter of each row but the first is padding."""
    ids = torch.full((B, S), 11)
    mask = torch.ones(B, S, dtype=torch.int64)
    mask[1:, : S // 4] = 0
    return ids, (mask if left else mask.flip(1)) if padded else None


def given(**inputs: Any) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if value is not None}


def cache_of(out: Any) -> dict[str, Any]:
    name = "cache" if "cache" in out else "past_key_values"
    return {name: out[name]}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", families("decoder"))
def test_it_says_what_a_step_of_decoding_runs(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, "hf_attn_patch")
    ids, mask = tokens(model, 3, 16, padded, left=True)
    for q_len in (1, 4):
        said = explain(model, batch=3, q_len=q_len, kv_len=16, padded=padded)
        assert said.unasked == ()
        past = 16 - q_len
        before = None if mask is None else mask[:, :past]
        with torch.no_grad():
            out = model(**given(input_ids=ids[:, :past], attention_mask=before, use_cache=True))
            with recorded(monkeypatch) as seen:
                model(**given(input_ids=ids[:, past:], attention_mask=mask, use_cache=True), **cache_of(out))
        assert asked(said) == Counter(seen)


@pytest.mark.parametrize("situation", ["prefill", "training"])
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", families("decoder", "encoder"))
def test_it_says_what_a_whole_row_runs(
    name: str, padded: bool, situation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, "hf_attn_patch")
    training = situation == "training"
    left = FAMILIES[name].kind == "decoder" and not training
    ids, mask = tokens(model, 3, 20, padded, left=left)
    said = explain(model, batch=3, q_len=20, kv_len=20, padded=padded, training=training)
    with recorded(monkeypatch) as seen:
        forward(model, training, **given(input_ids=ids, attention_mask=mask))
    assert asked(said) == Counter(seen)


@pytest.mark.parametrize("name", families("encoder-decoder"))
def test_it_says_what_encoder_decoder_and_cross_attention_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, "hf_attn_patch")
    ids, mask = tokens(model, 3, 20, True, left=False)
    for training in (False, True):
        said = explain(model, batch=3, q_len=20, kv_len=20, padded=True, training=training)
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids, "decoder_attention_mask": mask}
        with recorded(monkeypatch) as seen:
            forward(model, training, **inputs)
        assert asked(said) == Counter(seen)
        assert {kind.role.split(",")[0] for kind in said.kinds} == {"encoder", "decoder", "cross-attention"}
    model.eval()
    said = explain(model, batch=3, q_len=1, kv_len=20)
    with torch.no_grad():
        with recorded(monkeypatch) as first:
            out = model(input_ids=ids, decoder_input_ids=ids[:, :19])
        with recorded(monkeypatch) as seen:
            encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
            encoded.router_logits = None
            model(encoder_outputs=encoded, decoder_input_ids=ids[:, 19:], **cache_of(out))
    decoding = [(kind.request, kind.chosen) for kind in said.kinds if kind.role.split(",")[0] != "encoder"]
    assert set(decoding) == set(seen)
    encoding = [(kind.request, kind.chosen) for kind in said.kinds if kind.role.split(",")[0] == "encoder"]
    assert encoding and set(encoding) <= set(first)


@pytest.mark.parametrize("name", families("vision", "text-vision", "image-chat", "patches-chat"))
def test_towers_that_text_does_not_reach_are_asked_by_themselves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, "hf_attn_patch")
    said = explain(model, batch=3, q_len=20, kv_len=20)
    assert said.unasked == ()
    assert sum(len(kind.paths) for kind in said.kinds) == FAMILIES[name].calls
    if FAMILIES[name].kind == "image-chat":
        (vision,) = (kind for kind in said.kinds if kind.role == "vision")
        parts = (m for m in model.modules() if isinstance(m, transformers.PreTrainedModel))
        tower = next(m for m in parts if "Vision" in type(m).__name__)
        with recorded(monkeypatch) as seen:
            forward(tower, False, pixel_values=torch.randn(3, 3, 16, 16))
        assert {(vision.request, vision.chosen)} == set(seen)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_families_of_the_zoo(name: str) -> None:
    case = BY_NAME[name]
    model = case.make(2)
    said = explain(model, kv_len=12, q_len=12)
    assert said.unasked == ()
    assert said.kinds


def test_nothing_is_changed_and_nothing_is_left() -> None:
    model = build("gemma2", "eager", attention_dropout=0.1).train()
    x = model.model.layers[0].self_attn.q_proj
    heard: list[Any] = []
    x.register_forward_hook(lambda *_: heard.append(1))
    before = {name: (t.data_ptr(), t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    modes = [m.training for m in model.modules()]
    configured = model.config.to_dict()
    plan.forget()
    draws = torch.get_rng_state(), random.getstate(), _numpy_state().copy()
    for training in (False, True):
        explain(model, training=training, padded=True, kv_len=40)
    assert torch.equal(draws[0], torch.get_rng_state())
    assert draws[1] == random.getstate()
    assert (draws[2] == _numpy_state()).all()
    for name, t in model.state_dict(keep_vars=True).items():
        pointer, version, value = before[name]
        assert (t.data_ptr(), t._version) == (pointer, version) and torch.equal(t, value)
        assert t.grad is None
    assert modes == [m.training for m in model.modules()]
    assert configured == model.config.to_dict() and model.config._attn_implementation == "eager"
    assert not heard
    assert not (plan.plans_of_requests or plan.plans_of_kinds or plan.plain_calls)
    assert dispatch.listening.get() is None


def test_a_model_that_no_memory_holds() -> None:
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=40, num_attention_heads=128,
        num_key_value_heads=8, max_position_embeddings=131072, dtype=torch.bfloat16,
    )  # fmt: skip
    said = explain(config, batch=16, kv_len=131072, padded=True, device="cuda", capability=90)
    (kind,) = said.kinds
    assert (len(kind.paths), kind.chosen) == (40, "triton_decode")
    assert (kind.request.heads, kind.request.kv_heads, kind.request.head_dim) == (128, 8, 128)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert explain(model, batch=16, kv_len=131072, padded=True, device="cuda", capability=90).reasons == said.reasons


def test_two_kinds_of_layer_have_a_line_each() -> None:
    said = explain(build("gemma2", "eager"), q_len=40, kv_len=40)
    assert [kind.role for kind in said.kinds] == ["decoder, window of 5 keys", "decoder, full attention"]
    assert [kind.request.windowed for kind in said.kinds] == [True, False]
    text = str(said).splitlines()
    assert sum(line.startswith("decoder, ") for line in text) == 2


def test_mla_has_two_head_dimensions() -> None:
    (kind,) = explain(build("deepseek_v3", "eager"), q_len=9, kv_len=9).kinds
    assert (kind.request.head_dim, kind.request.value_dim) == (24, 12)


def test_t5_in_training_on_the_cpu() -> None:
    said = explain(build("t5", "eager"), training=True, kv_len=24)
    assert {kind.role: kind.chosen for kind in said.kinds}["encoder"] == "reference"
    assert {kind.role: kind.chosen for kind in said.kinds}["decoder"] == "reference"


def test_what_enable_refuses_is_refused_in_the_same_words() -> None:
    model = transformers.FalconForCausalLM(
        transformers.FalconConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=64)
    )
    with pytest.raises(AttentionError) as enabling:
        hf_attn_patch.enable(model)
    for asked_about in (model, model.config):
        with pytest.raises(AttentionError) as explaining:
            explain(asked_about)
        assert "computes attention in its own code" in str(explaining.value)
    assert str(explaining.value).split(" computes")[1] == str(enabling.value).split(" computes")[1]


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="transformers has no Gemma 4")
def test_layers_with_a_config_each() -> None:
    config = transformers.Gemma4TextConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=32, sliding_window=5, pad_token_id=0,
        vocab_size_per_layer_input=101, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    said = explain(config, q_len=30, kv_len=30, device="cpu")
    assert {(kind.request.head_dim, kind.request.windowed, len(kind.paths)) for kind in said.kinds} == {
        (16, True, 2),
        (32, False, 2),
    }


def test_a_backend_that_was_insisted_on() -> None:
    model = hf_attn_patch.enable(tiny_llama(), backend="reference")
    said = explain(model)
    assert said.chosen == "reference" and "runs this, as was insisted on" in str(said)
    hf_attn_patch.enable(model, backend="flash4")
    assert "was insisted on, and raises: needs a CUDA device" in str(explain(model))
    hf_attn_patch.enable(model)
    assert explain(model).chosen == "torch_sdpa"
    with hf_attn_patch.use_backend("reference"):
        assert explain(model).chosen == "reference"


def test_packed_documents() -> None:
    said = explain(tiny_llama(), packed=True, kv_len=32, batch=2)
    assert said.request.visibility == "packed"
    with pytest.raises(AttentionError, match="position_ids"):
        explain(build("t5", "eager"), packed=True, kv_len=32)
    with pytest.raises(AttentionError, match="q_len"):
        explain(tiny_llama(), packed=True, kv_len=32, q_len=1)


@pytest.mark.parametrize("lengths", [{"batch": 0}, {"q_len": 0}, {"q_len": 9, "kv_len": 8}])
def test_lengths_that_do_not_go_together(lengths: dict[str, Any]) -> None:
    with pytest.raises(AttentionError, match="each from 1"):
        explain(tiny_llama(), **lengths)


def test_a_device_that_is_not_here() -> None:
    said = explain(tiny_llama(), q_len=1, kv_len=512, padded=True, device="cuda", capability=90, dtype=torch.bfloat16)
    assert (said.request.device, said.request.capability, said.request.dtype) == ("cuda", 90, torch.bfloat16)
    assert said.request.visibility == "dense"
    assert said.chosen == "triton_decode" and said.note is None
    turing = explain(tiny_llama(), kv_len=512, q_len=512, device="cuda", capability=75, dtype=torch.float16)
    assert turing.chosen == "torch_sdpa"
    assert "never tuned for a GPU of compute capability 7.5: the order of the backends is that of an" in str(turing)
    bf16 = explain(tiny_llama(), device="cuda", capability=75, dtype=torch.bfloat16)
    assert "not 7.5; use float16" in str(dict(bf16.reasons)["torch_sdpa"])
    assert explain(tiny_llama(), device="hip").request.device == "hip"
    assert explain(tiny_llama(), device="mps").chosen == "torch_sdpa"


def test_what_is_no_model() -> None:
    for config in (transformers.LlamaConfig(hidden_act="none such"), transformers.AlignTextConfig()):
        said = f"^no model can be made of {type(config).__name__} \\(.*Error: .+"
        with pytest.raises(AttentionError, match=said) as no:
            explain(config)
        assert len(str(no.value).splitlines()) == 1
    with pytest.raises(AttentionError, match="neither a transformers model nor a config"):
        explain(torch.nn.Linear(2, 2))
    with pytest.raises(AttentionError, match="neither a transformers model nor a config"):
        explain({"hidden_size": 3})


@pytest.mark.parametrize("capability", [75, 80, 90, 120])
def test_a_capability_means_a_gpu(capability: int) -> None:
    """Also of a model that lies on the CPU, and in the two numbers that torch has for it."""
    model = tiny_llama().half()
    asked = explain(model, batch=2, kv_len=4096, padded=True, capability=capability).request
    assert (asked.device, asked.capability) == ("cuda", capability)
    pair = explain(model, batch=2, kv_len=4096, padded=True, capability=divmod(capability, 10))
    assert pair.request == asked


@pytest.mark.parametrize("capability", ["90", 9, 9.0, True, (9, 0, 0), ("9", "0"), (9.0, 0), -90])
def test_what_is_no_capability(capability: Any) -> None:
    with pytest.raises(AttentionError, match="is none: 75 or"):
        explain(tiny_llama(), device="cuda", capability=capability)


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu", "hip"])
def test_other_devices_have_no_capability(device: str) -> None:
    with pytest.raises(AttentionError, match="is that of a CUDA GPU"):
        explain(tiny_llama(), device=device, capability=90)
