"""What other engines read of a checkpoint: a converted one has the names, the shapes and the config they expect.

vLLM's rules are those of its model loaders (`stacked_params_mapping` of vllm/model_executor/models/llama.py and its
sisters, `QKVParallelLinear` of its layers); llama.cpp's those of convert_hf_to_gguf.py, whose table of names is the
package `gguf`.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import tiny_model
from works_with import works_with

from hf_attn_patch.conversion import ConversionError, convert

HQ, HKV = 8, 2
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2", "phi3")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, dict[str, torch.Tensor]]]:
    """Family -> its config and its tensors, converted once."""

    @functools.cache
    def made(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp(family)
        tiny_model(family).save_pretrained(folder / "source")
        convert(folder / "source", folder / "result", HKV)
        config = json.loads((folder / "result/config.json").read_text())
        return config, load_file(folder / "result/model.safetensors")

    return made


@works_with("vLLM", "names, shapes and config that its loaders read (rules)", "vllm serve llama-2-7b-gqa8")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_vllm_can_shard_it(family: str, ranks: int, converted: Any) -> None:
    """Each rank takes its rows of q, k and v; with fewer KV heads than ranks, ranks share a head."""
    config, tensors = converted(family)
    heads, kv_heads, width = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    assert config["architectures"][0].endswith("ForCausalLM") and config["model_type"] == family
    assert (heads, kv_heads) == (HQ, HKV)
    assert kv_heads % ranks == 0 or ranks % kv_heads == 0
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}.self_attn."
        if family == "phi3":
            assert tensors[f"{layer}qkv_proj.weight"].shape == ((heads + 2 * kv_heads) * head_dim, width)
            continue
        for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            weight = tensors[f"{layer}{name}.weight"]
            assert weight.shape == (count * head_dim, width)
            own = max(1, count // ranks) * head_dim
            copies = max(1, ranks // count)
            for rank in range(ranks):
                assert weight.narrow(0, rank // copies * own, own).shape[0] == own
            bias = tensors.get(f"{layer}{name}.bias")
            assert bias is None or bias.shape == (count * head_dim,)
        assert tensors[f"{layer}o_proj.weight"].shape == (width, heads * head_dim)


@pytest.mark.parametrize("name", ["gpt_neox.GroupedGPTNeoXAttention", "opt.GroupedOPTAttention"])
def test_vllm_finds_the_call_of_the_interface(name: str) -> None:
    """Its transformers backend reads the layer's own forward: one look-up, kept under a name, and one call of it."""
    module, _, layer = name.partition(".")
    forward = getattr(importlib.import_module(f"hf_attn_patch.modeling.{module}"), layer).forward
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    kept = [
        ast.unparse(node.targets[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    ]
    calls = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in kept
    ]
    assert len(kept) == len(calls) == 1


@works_with("llama.cpp", "names and head counts that its converter reads (its own name table)", "convert_hf_to_gguf.py")
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_knows_every_tensor(family: str, converted: Any) -> None:
    gguf = pytest.importorskip("gguf")
    config, tensors = converted(family)
    architecture = {"mistral": "LLAMA", "llama": "LLAMA"}.get(family, family.upper())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config["num_hidden_layers"])
    unknown = [name for name in tensors if names.get_name(name, try_suffixes=(".weight", ".bias")) is None]
    assert unknown == []
    assert config["num_key_value_heads"] == HKV  # becomes attention.head_count_kv


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """LlamaModel.permute of the converter: rows of each head, its halves in turns. [heads * D, E]."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def rope(x: torch.Tensor, theta: float, interleaved: bool) -> torch.Tensor:
    """[S, heads, D] turned by position: pairs (j, j + D/2) as transformers does, or (2j, 2j + 1) as llama.cpp does."""
    S, _, D = x.shape
    angle = torch.arange(S)[:, None] * theta ** (-torch.arange(0, D, 2) / D)
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.view_as_real(turned).flatten(-2)  # scores do not depend on the order of the pairs


@works_with("llama.cpp", "RoPE's order of rows, turned KV head by KV head", "convert_hf_to_gguf.py")
def test_llama_cpp_turns_the_grouped_heads_right(converted: Any) -> None:
    """It permutes k_proj by num_key_value_heads of the config; its RoPE on that gives the scores of transformers'."""
    config, tensors = converted("llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    theta = config["rope_parameters"]["rope_theta"]
    q, k = (tensors[f"model.layers.0.self_attn.{name}_proj.weight"].float() for name in "qk")
    x = torch.randn(7, config["hidden_size"], generator=torch.Generator().manual_seed(0))

    def scores(q: torch.Tensor, k: torch.Tensor, interleaved: bool) -> torch.Tensor:
        queries = rope((x @ q.T).unflatten(-1, (heads, -1)), theta, interleaved)
        keys = rope((x @ k.T).unflatten(-1, (kv_heads, -1)), theta, interleaved)
        return torch.einsum("qhd,khd->hqk", queries, keys.repeat_interleave(heads // kv_heads, 1))

    want = scores(q, k, interleaved=False)
    torch.testing.assert_close(scores(permuted(q, heads), permuted(k, kv_heads), interleaved=True), want)
    wrong = scores(permuted(q, heads), permuted(k, 2 * kv_heads), interleaved=True)  # another number of heads
    assert not torch.allclose(wrong, want, rtol=0.1)


@works_with("torchao", "a quantized source is refused in one sentence", "hf-attn convert QUANTIZED DST --kv-heads 8")
def test_torchao_source_is_refused(multi_head: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    model = AutoModelForCausalLM.from_pretrained(
        multi_head, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "quantized")
    with pytest.raises(ConversionError, match=r"quantized checkpoint \(torchao\); convert the unquantized one"):
        convert(tmp_path / "quantized", tmp_path / "result", 2)
    assert not (tmp_path / "result").exists()


@works_with("torchao", "a converted model, quantized afterwards", "TorchAoConfig(Int8WeightOnlyConfig())")
def test_torchao_after_conversion(grouped: Path, load: Any, batch: dict[str, torch.Tensor]) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    model = AutoModelForCausalLM.from_pretrained(
        grouped, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), attn_implementation="hf_attn_patch"
    ).eval()
    seen = batch["attention_mask"] == 1
    with torch.no_grad():
        full, quantized = load()(**batch).logits[seen], model(**batch).logits[seen]
    assert 0 < float((full - quantized).norm() / full.norm()) < 0.05
