"""What training adds: dropout, checkpointing, autocast; and attention weights on request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conformance import assert_conforms
from families import FAMILIES, families
from family_inputs import make_inputs, normal
from family_runs import IMPLEMENTATION, assert_close, build, functional, gradients, pair, run
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_attn_patch.compat.calls import generate_keyword

_CORE = families(trait="core")


def _module(training: bool) -> Any:
    module: Any = torch.nn.Module()
    module.is_causal, module.layer_idx, module.num_key_value_groups = False, 0, 2
    module.config = SimpleNamespace(_attn_implementation=IMPLEMENTATION)
    return module.train(training)


@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "masked"])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_of_attention_weights(p: float, masked: bool) -> None:
    """With V the identity the output is the dropped weights themselves: each is 0 or weight / (1 - p)."""
    B, HQ, HKV, S = 8, 4, 2, 64
    q, k = (normal(B, heads, S, 16, seed=heads).requires_grad_() for heads in (HQ, HKV))
    v = torch.eye(S).expand(B, HKV, S, S).clone().requires_grad_()
    mask = (normal(B, 1, S, S, seed=9) > -1) | torch.eye(S, dtype=torch.bool) if masked else None
    attend = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
    torch.manual_seed(1)
    out, _ = attend(_module(True), q, k, v, mask, dropout=p, scaling=0.25, is_causal=False)
    dropped = out.transpose(1, 2)

    keys = k.repeat_interleave(HQ // HKV, dim=1)
    scores = q @ keys.transpose(2, 3) * 0.25
    weights = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)
    seen = weights > 1e-6
    kept = dropped.detach() != 0
    torch.testing.assert_close(dropped[kept], (weights / (1 - p))[kept], rtol=1e-4, atol=1e-6)
    n = int(seen.sum())
    rate = 1 - float(kept[seen].sum()) / n
    assert abs(rate - p) < 4 * (p * (1 - p) / n) ** 0.5, f"dropped {rate:.4f} of {n} weights, not {p}"
    # no two heads or batch entries share a pattern
    patterns = kept.flatten(2).flatten(0, 1).float()
    assert patterns.unique(dim=0).shape[0] == B * HQ

    # the gradients belong to the pattern that was drawn
    wanted = (weights * kept / (1 - p)) @ v.repeat_interleave(HQ // HKV, dim=1)
    cotangent = normal(*wanted.shape, seed=5)
    found_grads = torch.autograd.grad((dropped * cotangent).sum(), (q, k, v))
    wanted_grads = torch.autograd.grad((wanted * cotangent).sum(), (q, k, v))
    for found, want in zip(found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_dropout_has_the_right_expectation() -> None:
    """The mean over many draws is the output without dropout."""
    q, k, v = normal(1, 4, 6, 16), normal(1, 2, 6, 16, seed=1), normal(1, 2, 6, 16, seed=2)
    attend = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
    wanted, _ = attend(_module(False), q, k, v, None, dropout=0.0, scaling=0.25, is_causal=False)
    torch.manual_seed(0)
    n = 2000
    # the batch is the sample: one call draws n times
    draws, _ = attend(
        _module(True), *(x.expand(n, -1, -1, -1) for x in (q, k, v)), None, dropout=0.3, scaling=0.25, is_causal=False
    )
    error = (draws.mean(0, keepdim=True) - wanted).abs()
    assert (error < 5 * draws.std(0, keepdim=True) / n**0.5).all()


_DROPOUT = {
    "llama": "attention_dropout",
    "gemma2": "attention_dropout",
    "gpt_oss": "attention_dropout",
    "gpt2": "attn_pdrop",
    "bert": "attention_probs_dropout_prob",
    "bart": "attention_dropout",
    "t5": "dropout_rate",
}


@pytest.mark.parametrize("name", list(_DROPOUT))
def test_dropout_only_in_training(name: str) -> None:
    model, plain = build(name, IMPLEMENTATION, **{_DROPOUT[name]: 0.4}), build(name, "eager", **{_DROPOUT[name]: 0.4})
    inputs = make_inputs(FAMILIES[name], "left")
    with torch.no_grad():
        assert_close(run(model, inputs), run(plain, inputs))
        model.train()
        first, second = run(model, inputs), run(model, inputs)
    for path in first:
        assert torch.isfinite(first[path]).all()
        assert not torch.equal(first[path], second[path])


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", [n for n in _CORE if FAMILIES[n].kind not in ("speech", "vision")])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model, eager = build(name, IMPLEMENTATION), build(name, "eager")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    if reentrant:
        model.enable_input_require_grads()
    inputs = make_inputs(FAMILIES[name], "left")
    found, wanted = run(model, inputs, **_no_cache(name)), run(eager, inputs, **_no_cache(name))
    assert_close(found, wanted)
    functional(found).backward()
    functional(wanted).backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, eager)]
    assert_close(*grads, rtol=2e-5)


def _no_cache(name: str) -> dict[str, Any]:
    return {"use_cache": False} if FAMILIES[name].kind in ("decoder", "encoder-decoder", "speech-to-text") else {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("how", ["autocast", "weights"])
@pytest.mark.parametrize("name", _CORE)
def test_half_precision(name: str, how: str, dtype: torch.dtype) -> None:
    """No further from fp32 than eager in the same precision, up to a factor of two."""
    family = FAMILIES[name]
    inputs = make_inputs(family, "left" if family.kind != "vision" else "none")
    with torch.no_grad():
        ref = run(pair(name)[1], inputs)
        if how == "autocast":
            with torch.autocast("cpu", dtype):
                found, low = (run(model, inputs) for model in pair(name))
        else:
            floats = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.kwargs.items()}
            inputs.kwargs = floats
            found, low = (run(build(name, i).to(dtype), inputs) for i in (IMPLEMENTATION, "eager"))
    for path, want in ref.items():
        assert found[path].dtype == low[path].dtype
        assert_conforms(found[path], low[path], want)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", families())
def test_output_attentions(name: str, padding: str) -> None:
    family = FAMILIES[name]
    if padding != "none" and family.kind == "vision":
        pytest.skip("no padding")
    ours, eager = pair(name)
    inputs = make_inputs(family, padding)
    with torch.no_grad():
        found, wanted = (model(**inputs.kwargs, output_attentions=True) for model in (ours, eager))
    text = inputs.rows.get("logits", inputs.rows.get("last_hidden_state"))
    rows_of = {"encoder_attentions": inputs.rows.get("encoder_last_hidden_state")}
    checked = 0
    for field in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        rows = rows_of.get(field, text)
        for weights, want in zip(getattr(found, field, None) or (), getattr(wanted, field, None) or (), strict=True):
            assert (weights is None) == (want is None)
            if want is not None:  # [B, HQ, Sq, Sk] -> rows of [HQ, Sk]
                ours_rows, eager_rows = (
                    w.transpose(1, 2) if rows is None else w.transpose(1, 2)[rows] for w in (weights, want)
                )
                torch.testing.assert_close(ours_rows, eager_rows, rtol=1e-5, atol=1e-5)  # they lie in [0, 1]
                checked += 1
    if not checked:
        pytest.skip("the family returns no attention weights")


@pytest.mark.parametrize("name", ["llama", "llama-mha", "gemma2"])
def test_gradients_through_steps_of_one_static_cache(name: str) -> None:
    """The second step writes to the memory that the first one attended to."""
    model, ids = build(name, IMPLEMENTATION), make_inputs(FAMILIES[name], S=9).kwargs["input_ids"]
    found = []
    for cache in (StaticCache(model.config, max_cache_len=12), DynamicCache(config=model.config)):
        steps = [model(ids[:, piece], **{generate_keyword(): cache}).logits for piece in (slice(0, 5), slice(5, 9))]
        found.append(gradients(model, {"logits": torch.cat(steps, 1)}))
    assert_close(*found, rtol=2e-5)
