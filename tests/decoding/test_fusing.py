"""Recorded steps in fewer kernels: the same tokens, what was fused where, and what is left as it was and why.

The kernels run in Triton's interpreter, so the models have a layer or two and the calls a few tokens.
"""

from __future__ import annotations

import interpreter  # isort: skip - before the kernels
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from decoding import HYBRID, SIZES, batch, generate

import hf_attn_patch
from hf_attn_patch.attn import ladder, plan
from hf_attn_patch.decoding import cuda_graphs as graphs
from hf_attn_patch.decoding import fusing, product_sites, step

pytestmark = pytest.mark.skipif(interpreter.DEVICE == "cuda", reason="tests/gpu has the same on a GPU")
NORM, TURN, GATE = "norms", "rotary embeddings with the cache's new token", "gated activations"
TOKENS = 5  # the last two by the fused step: the second sees what the first has written


@pytest.fixture(autouse=True)
def _our_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Steps are recorded on the CPU, at once, and attention is the decode kernel's: an operator without questions."""
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    monkeypatch.setattr(step, "FUSED_SHORT", 0)
    monkeypatch.setattr(step, "SHORT", 0)
    monkeypatch.setattr("hf_attn_patch.decoding.generating.SHORT", 0)
    monkeypatch.setattr(ladder, "_CPU", ("triton_decode", *(n for n in ladder._CPU if n != "triton_decode")))
    plan.forget()
    yield
    plan.forget()


def model_of(model_type: str, dtype: torch.dtype = torch.float32, **others: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, "num_hidden_layers": 1, **others})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # weights that do something
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    return hf_attn_patch.enable(model, cache=None, cuda_graphs=False)


def fused(model: Any, rows: int = 2, **how: Any) -> tuple[Counter[str] | str | None, torch.Tensor, torch.Tensor]:
    """What is told, the tokens with fused steps, and those without any, by the formula of attention."""
    inputs = batch("cpu", rows, 7, padded=False)
    hf_attn_patch.enable(model, cuda_graphs=False)
    with hf_attn_patch.use_backend("reference"):
        expected = generate(model, inputs, max_new_tokens=TOKENS, **how)
    hf_attn_patch.enable(model, cuda_graphs=True)
    tokens = generate(model, inputs, max_new_tokens=TOKENS, **how)
    return fusing.told.get(model), tokens, expected


SMALL_HYBRID = {**HYBRID, "layer_types": ["sliding_attention"]}
#: model type -> its own sizes, and how many of each kind a layer has, with the norm at the end
KINDS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": ({}, {NORM: 3, TURN: 1, GATE: 1}),
    "mistral": ({"sliding_window": None}, {NORM: 3, TURN: 1, GATE: 1}),
    "qwen2": ({}, {NORM: 3, TURN: 1, GATE: 1}),
    "qwen3": ({"head_dim": 16}, {NORM: 5, TURN: 1, GATE: 1}),
    "gemma": ({"head_dim": 16}, {NORM: 3, TURN: 1, GATE: 1}),
    "gemma2": (SMALL_HYBRID, {NORM: 5, TURN: 1, GATE: 1}),
    "gemma3_text": (SMALL_HYBRID, {NORM: 7, TURN: 1, GATE: 1}),
    "olmo2": ({}, {NORM: 5, TURN: 1, GATE: 1}),
    "phi3": ({}, {NORM: 3, GATE: 1, "the cache's new token": 1}),
    "gpt2": ({"n_embd": 64, "n_layer": 1, "n_head": 4, "pad_token_id": None}, {"the cache's new token": 1}),
}


@pytest.mark.parametrize("model_type", KINDS)
def test_the_same_tokens_and_what_was_fused(model_type: str) -> None:
    sizes, kinds = KINDS[model_type]
    model = model_of(model_type, **sizes)
    found, tokens, expected = fused(model)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
    assert found == Counter(kinds)


def test_one_row_has_its_products_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_sites, "LEAST", 1)
    for model_type in ("llama", "qwen2"):  # without and with biases
        model = model_of(model_type)
        found, tokens, expected = fused(model, rows=1)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
        together = {"gated products": 1, "products of the same rows together": 1, "products": 3}
        assert found == Counter({NORM: 3, TURN: 1, **together})


def test_it_is_told_and_off_by_name() -> None:
    model = model_of("llama")
    fused(model)
    said = "with one kernel each for 1 gated activations, 3 norms, 1 rotary embeddings with the cache's new token"
    assert said in str(hf_attn_patch.explain(model))
    hf_attn_patch.enable(model, cuda_graphs="unfused")
    inputs = batch("cpu", 2, 7, padded=False)
    generate(model, inputs, max_new_tokens=TOKENS)
    assert model not in fusing.told
    assert "Decoding steps are recorded as CUDA graphs." in str(hf_attn_patch.explain(model))


def test_where_a_kernel_is_not_as_exact_the_operators_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_attn_patch.attn.kernels import small

    right = small.gated
    monkeypatch.setattr(small, "gated", lambda *a: [right(*a)[0] * (1 + 2**-12)])
    model = model_of("llama")
    found, tokens, expected = fused(model)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
    assert found == Counter({NORM: 3, TURN: 1})


def wrapped(model: Any, change: Any) -> Any:
    """A model whose MLP is followed by ``change``."""
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: change(forward(x))
    return model


def unseen(x: torch.Tensor) -> torch.Tensor:
    """A kernel that is no operator: NumPy's, here."""
    out = torch.empty_like(x)
    out.detach().numpy()[...] = x.detach().numpy() * 2
    return out


def unseen_in_place(x: torch.Tensor) -> torch.Tensor:
    x.detach().numpy()[...] *= 2
    return x


def looking(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.sum().item() < torch.inf else x


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (unseen, "it runs kernels that are no operators of PyTorch"),
        (unseen_in_place, "its operators give something else when they are run again"),
        (looking, "it reads numbers of the device (aten._local_scalar_dense.default)"),
    ],
)
def test_what_cannot_be_written_down_is_recorded_as_it_is(change: Any, why: str) -> None:
    model = wrapped(model_of("llama"), change)
    found, tokens, expected = fused(model)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
    assert found == why
    assert f"each operator with its own kernels ({why})" in str(hf_attn_patch.explain(model))


def test_fewer_kernels_that_cannot_be_recorded_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU refuses to record is told, and the step is recorded as it is."""
    repetition = step.Repetition
    tried = []

    def record(work: Any, device: torch.device) -> Any:
        tried.append(work)
        if len(tried) == 1:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return repetition(work, device)

    monkeypatch.setattr(step, "record", record)
    told, tokens, expected = fused(model_of("llama"))
    assert told == "RuntimeError: operation not permitted when stream is capturing"
    assert len(tried) == 2
    assert torch.equal(tokens, expected)


def test_a_step_that_cannot_even_be_watched_is_recorded_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(self: Any) -> None:
        raise RuntimeError("an operator of a kind that nobody knows\nand more")

    monkeypatch.setattr(step.Tape, "run_again", odd)
    model = model_of("llama")
    told, tokens, expected = fused(model)
    assert told == "RuntimeError: an operator of a kind that nobody knows"
    assert str(graphs.recording_of(model)).startswith("recorded as CUDA graphs, each operator with its own kernels")
    assert torch.equal(tokens, expected)


def test_what_changes_between_calls_is_seen() -> None:
    """The step is written down anew for each cache: what was verified before is not what runs."""
    model = model_of("llama")
    fused(model)
    fused(model)
    wrapped(model, lambda x: x * 3)
    found, tokens, expected = fused(model)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
    assert found == Counter({NORM: 3, TURN: 1, GATE: 1})


def test_under_inference_mode() -> None:
    model = model_of("llama")
    with torch.inference_mode():
        found, tokens, expected = fused(model)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
    assert found == Counter({NORM: 3, TURN: 1, GATE: 1})


@pytest.mark.parametrize("model_type", ["llama", "gemma", "olmo2"])
def test_half_precision_is_as_near_to_fp64(model_type: str) -> None:
    """Logits of one fused step and of one ordinary one, against the model in fp64."""
    model = model_of(model_type, torch.float16, initializer_range=0.1)
    exact = model_of(model_type, torch.float64, initializer_range=0.1)
    exact.load_state_dict(model.state_dict())
    ids = batch("cpu", 2, 9, padded=False)["input_ids"]
    with torch.no_grad():
        truth = exact(ids).logits[:, 6:]
        plain = model(ids).logits[:, 6:]
        hf_attn_patch.enable(model, cuda_graphs=True)
        cache = hf_attn_patch.GrowingCache(config=model.config)
        model(ids[:, :5], past_key_values=cache)
        found = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 9)]
    assert isinstance(fusing.told[model], Counter)
    near = (plain.double() - truth).abs().max()
    assert (torch.cat(found[1:], 1).double() - truth).abs().max() <= 2 * near + 2**-9
