"""Every function of compat/: right on what is installed, and one clear sentence where the ground has changed."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from hf_attn_patch.compat import generation, model_classes, python
from hf_attn_patch.compat import torch as of_torch
from hf_attn_patch.compat import transformers as of_transformers
from hf_attn_patch.compat.ground import CompatError


def config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **more
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return LlamaForCausalLM(config(attn_implementation="sdpa"))


def test_a_configs_attention_is_read_and_written(model: Any) -> None:
    for of in (of_transformers, model_classes):
        one = config(attn_implementation="sdpa")
        assert of.attention_name(one) == "sdpa"
        of.set_attention_name(one, "eager")
        assert of.attention_name(one) == "eager"
        assert type(LlamaModel(one).layers[0].self_attn).__name__ == "LlamaAttention"


def test_models_say_how_they_attend_and_what_stays_whole(model: Any) -> None:
    assert of_transformers.goes_through_interface(model)
    assert not of_transformers.goes_through_interface(transformers.BloomModel)
    assert of_transformers.whole_blocks(model) == {"LlamaDecoderLayer"}
    assert of_transformers.whole_blocks(torch.nn.Linear(1, 1)) == set()
    assert (
        of_transformers.global_functions(transformers.AttentionInterface)["sdpa"].__name__ == "sdpa_attention_forward"
    )


def test_auto_tables() -> None:
    classes = of_transformers.auto_model_classes()
    assert {"AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"} <= set(classes)
    assert not {"AutoConfig", "AutoTokenizer"} & set(classes)
    assert of_transformers.is_auto_class(AutoModel)
    assert not of_transformers.is_auto_class(LlamaModel)
    assert of_transformers.classes_of(AutoModelForCausalLM, config()) == (LlamaForCausalLM,)
    assert of_transformers.classes_of(AutoModelForCausalLM, transformers.ViTConfig()) == ()
    assert of_transformers.class_names_of(AutoModel, "funnel") == ("FunnelModel", "FunnelBaseModel")
    assert of_transformers.class_names_of(AutoModel, "no such type") == ()
    assert of_transformers.config_class_names()["llama"] == "LlamaConfig"
    assert type(of_transformers.model_from_config(LlamaModel, config())) is LlamaModel


def test_hooks_and_collector(model: Any) -> None:
    layer: Any = torch.nn.Linear(1, 1)
    assert not of_torch.forward_hooks(layer) and not of_torch.has_forward_hooks(layer)
    before, after = layer.register_forward_pre_hook(print), layer.register_forward_hook(repr)
    assert of_torch.forward_hooks(layer) == [print, repr]
    assert of_torch.has_forward_hooks(layer)
    before.remove()
    after.remove()
    assert not of_torch.forward_hooks_of_all()
    of_all: Any = torch.nn.modules.module
    for register in (of_all.register_module_forward_pre_hook, of_all.register_module_forward_hook):
        with register(print):
            assert of_torch.forward_hooks_of_all()
    assert not of_torch.forward_hooks_of_all()
    seen: list[Any] = []
    collector = of_transformers.output_collector()
    attention = model.model.layers[0].self_attn
    handle = attention.q_proj.register_forward_hook(lambda *_: seen.append(collector.get()))
    model(torch.tensor([[1]]), output_attentions=True)
    handle.remove()
    assert "attentions" in seen[0]
    assert collector.get() is None
    assert any(of_transformers.captures_outputs(hook) for hook in of_torch.forward_hooks(attention))
    assert not of_transformers.captures_outputs(print)
    accelerate_hooks = pytest.importorskip("accelerate.hooks")
    assert not of_transformers.has_accelerate_hook(layer)
    accelerate_hooks.add_hook_to_module(layer, accelerate_hooks.ModelHook())
    assert of_transformers.has_accelerate_hook(layer)


def test_torchs_switches_and_counts() -> None:
    for enabled in (False, True):
        with torch.autocast("cpu", enabled=enabled):
            assert of_torch.any_autocast() is of_torch._any_autocast_publicly() is enabled
    x = torch.zeros(3)
    assert of_torch.storage_users(x) == 1
    views = [x[:1], x[1:]]
    assert of_torch.storage_users(x) == 1 + len(views)
    with pytest.raises(RuntimeError):
        of_torch.write_count(torch.inference_mode()(torch.zeros)(1))
    with of_torch.recompile_limit(77):
        assert torch._dynamo.config.recompile_limit == 77
    assert torch._dynamo.config.recompile_limit != 77


def test_tensors_of_modules_and_copies(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    norm = torch.nn.BatchNorm1d(2)
    parameters, buffers = of_torch.own_tensors(norm)
    parameters["weight"] = torch.nn.Parameter(torch.full((2,), 3.0))
    assert norm.weight.tolist() == [3.0, 3.0] and set(buffers) == {
        "running_mean", "running_var", "num_batches_tracked"
    }  # fmt: skip
    for _ in ("together", "one by one"):
        targets = [torch.zeros(2), torch.zeros(1, dtype=torch.float64)]
        of_torch.copy_all(targets, [torch.ones(2), torch.full((1,), 2.0)])
        assert [t.tolist() for t in targets] == [[1.0, 1.0], [2.0]]
        monkeypatch.delattr(torch, "_foreach_copy_", raising=False)
    assert of_transformers.tied_names(model) == {"lm_head.weight"}


def test_kernels_that_are_gone_say_so_when_they_are_called() -> None:
    q = torch.randn(1, 2, 3, 8)
    out, _ = of_torch.cpu_flash_attention_op(q, q, q, 0.0, True)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    with pytest.raises(CompatError, match=r"aten\._no_such_kernel of torch .* install"):
        of_torch._kernel("torch.ops.aten._no_such_kernel")(q)


def test_pythons_own() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--one")
    assert [action.dest for action in python.actions_of(parser)] == ["one"]
    assert python.process_number() == 0 or python.process_number() > 0
    with ProcessPoolExecutor(1) as pool:
        assert pool.submit(python.process_number).result() >= 0
        python.stop_workers(pool)


CHANGED: dict[str, Callable[[], Any]] = {
    "_attn_implementation": lambda: of_transformers.attention_name(SimpleNamespace()),
    "_can_set_attn_implementation": lambda: of_transformers.goes_through_interface(SimpleNamespace()),
    "_global_mapping": lambda: of_transformers.global_functions(SimpleNamespace()),
    "_from_config": lambda: of_transformers.model_from_config(SimpleNamespace(), None),
    "_model_mapping": lambda: of_transformers.classes_of(SimpleNamespace(), None),
    "_prepare_cache_for_generation": lambda: generation.generate_method(SimpleNamespace(), generation.PREPARE_CACHE),
    "_prefill": lambda: generation.generate_method(SimpleNamespace(), generation.PREFILL),
    "_forward_hooks": lambda: of_torch.forward_hooks(SimpleNamespace()),  # type: ignore[arg-type]
    "_version": lambda: of_torch.write_count(SimpleNamespace()),  # type: ignore[arg-type]
    "_actions": lambda: python.actions_of(SimpleNamespace()),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", CHANGED)
def test_changed_ground_is_said_in_one_sentence(name: str) -> None:
    with pytest.raises(CompatError, match=rf"{name}.* from \w+ [\d.]+ to [\d.]+; install one of those") as caught:
        CHANGED[name]()
    assert "\n" not in str(caught.value)


def test_importing_survives_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the collector: a warning, and nothing is collected."""
    from transformers.utils import output_capturing

    monkeypatch.delattr(output_capturing, "_active_collector")
    with pytest.warns(RuntimeWarning, match="output_attentions=True gives no attentions"):
        assert of_transformers.output_collector().get() is None


def test_every_function_says_what_it_touches() -> None:
    for module in (of_torch, of_transformers, python):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                assert function.__doc__ or name.startswith("_"), f"{module.__name__}.{name}"


def test_tritons_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from hf_attn_patch.compat import triton as of_triton

    assert of_triton.raw_stream(torch.device("cpu")) == 0
    assert of_triton.compiled_parts(SimpleNamespace()) is None  # interpreted, or named otherwise
    parts = {"launch": print, "launch_pdl": True, "global_scratch_size": 0, "profile_scratch_size": 0}
    run = SimpleNamespace(**parts, launch_cooperative_grid=False)
    kernel = SimpleNamespace(function=7, packed_metadata=(1,), run=run)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert of_triton.compiled_parts(kernel) == (7, (1,), None, False)  # no launcher that is known
    run = kernel.run = type("CudaLauncher", (SimpleNamespace,), {})(**parts, launch_cooperative_grid=False)
    assert of_triton.compiled_parts(kernel) == (7, (1,), print, True)
    run.global_scratch_size = 8
    assert of_triton.compiled_parts(kernel) == (7, (1,), None, True)
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert of_triton.compiled_parts(kernel) == (7, (1,), None, False)
    assert not of_triton.is_watched()
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", print)
    assert of_triton.is_watched()
