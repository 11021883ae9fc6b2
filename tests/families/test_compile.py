"""torch.compile(fullgraph=True): forward, and generate with a static cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES
from family_inputs import make_inputs
from family_runs import IMPLEMENTATION, assert_close, build, gradients, pair, run
from transformers import CompileConfig

#: Each for another way through the masks: plain, windows with softcap, sinks, no interface for GQA, an encoder,
#: cross-attention, position biases, no mask at all. Tracing is what is tested, and takes seconds each.
_FORWARD = ["llama", "gemma2", "gpt_oss", "gpt2", "bert", "bart", "t5", "vit"]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _once(name: str, padding: str) -> Any:
    """Only the plainest and those with the most kinds of attention also with the oldest transformers."""
    return pytest.param(name, padding, marks=[] if name in ("llama", "t5", "bart") else pytest.mark.once)


@pytest.mark.parametrize(
    ("name", "padding"), [("llama", "none"), *(_once(n, "none" if n == "vit" else "left") for n in _FORWARD)]
)
def test_forward_in_one_graph(name: str, padding: str) -> None:
    model, eager = build(name, IMPLEMENTATION), pair(name)[1]
    inputs = make_inputs(FAMILIES[name], padding)
    kwargs = {"use_cache": False} if FAMILIES[name].kind in ("decoder", "encoder-decoder") else {}
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    found, wanted = run(model, inputs, **kwargs), run(eager, inputs, **kwargs)
    assert_close(found, wanted)
    assert_close(gradients(model, found), gradients(eager, wanted), rtol=2e-5)


def test_padding_inside_a_row_begins_no_document() -> None:
    """Positions that count tokens stand still over padding, as those of a right-padded prompt that was continued."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 0]])
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) + 3, "attention_mask": mask, "use_cache": False}
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    model, eager = build("llama", IMPLEMENTATION), pair("llama")[1]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        wanted, plain, found = (m(**inputs).logits[mask.bool()] for m in (eager, model, compiled))
    torch.testing.assert_close(plain, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", [False, True])
def test_documents_by_their_borders_in_one_graph(positions: bool) -> None:
    """Each document's logits are those that it has alone."""
    documents = [torch.arange(n)[None] + 3 * n for n in (3, 4, 5)]
    borders = torch.tensor([0, 3, 7, 12], dtype=torch.int32)
    inputs: dict[str, Any] = {"input_ids": torch.cat(documents, 1), "use_cache": False}
    inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 5, "max_length_k": 5}
    if positions:
        inputs["position_ids"] = torch.cat([torch.arange(n)[None] for n in (3, 4, 5)], 1)
    model, eager = build("mistral", IMPLEMENTATION), pair("mistral")[1]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        wanted = torch.cat([eager(document, use_cache=False).logits for document in documents], 1)
        torch.testing.assert_close(compiled(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)


def test_layers_compiled_one_by_one() -> None:
    """No layer breaks its graph to look for somebody who collects weights; and who asks for them still gets them."""
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) + 3, "use_cache": False}
    model, eager = build("llama", IMPLEMENTATION), pair("llama")[1]
    with torch.no_grad():
        for fullgraph in (
            True,
            False,
        ):  # False: the hooks break the graph, on any attention
            for layer in model.model.layers:
                layer.compile(fullgraph=fullgraph, backend="eager")
            torch.testing.assert_close(model(**inputs).logits, eager(**inputs).logits, atol=1e-5, rtol=1e-5)
        found, wanted = (m(**inputs, output_attentions=True).attentions for m in (model, eager))
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def _generate(model: Any, prompt: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    return model.generate(**prompt, **options, **kwargs)


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        ("llama", "none"),
        ("llama", "left"),
        _once("mistral", "left"),
        _once("gpt_oss", "left"),
        _once("gpt2", "left"),
        ("bart", "right"),
    ],
)
def test_static_cache_generation_in_one_graph(name: str, padding: str) -> None:
    """generate compiles the decoding forward; on a CPU only if asked to."""
    model, eager = build(name, IMPLEMENTATION), pair(name)[1]
    prompt = {k: v for k, v in make_inputs(FAMILIES[name], padding, S=9).kwargs.items() if not k.startswith("decoder_")}
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    found = _generate(model, prompt, compile_config=compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert torch.equal(found, _generate(eager, prompt, disable_compile=True))


@pytest.mark.slow
def test_inductor() -> None:
    """The default compiler on the whole forward and backward of a GQA model with padding."""
    model, eager = build("llama", IMPLEMENTATION), pair("llama")[1]
    inputs = make_inputs(FAMILIES["llama"], "left")
    model.forward = torch.compile(model.forward, fullgraph=True)
    found, wanted = run(model, inputs, use_cache=False), run(eager, inputs, use_cache=False)
    assert_close(found, wanted)
    assert_close(gradients(model, found), gradients(eager, wanted), rtol=5e-5)
