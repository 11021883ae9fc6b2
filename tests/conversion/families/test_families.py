"""Every family and layout: weights against arithmetic written out here, logits against a model with equal heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import tensors
from tiny_families import FAMILIES, tiny_model
from torch import Tensor

from hf_attn_patch.conversion import ConversionError, convert, plan

HEADS = 8
FLAT_NORMS = ("olmo2", "olmo3", "olmoe", "flex_olmo", "minimax_m2")
IDS = torch.tensor([[5, 9, 33, 2, 17, 60, 41]])


def reload(folder: Path, name: str) -> Any:
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def pooled(rows: Tensor, kv_heads: int, new: int) -> Tensor:
    """[kv_heads * D, ...] -> [new * D, ...], head by head."""
    size = rows.shape[0] // kv_heads
    per_group = kv_heads // new
    heads = [rows[i * size : (i + 1) * size] for i in range(kv_heads)]
    return torch.cat([torch.stack(heads[g * per_group : (g + 1) * per_group]).sum(0) / per_group for g in range(new)])


def kv_rows(model_type: str, head_dim: int, kv_heads: int) -> tuple[list[int], list[int], list[int]]:
    """Which rows of a tensor are q, k and v; a fused layout is spelled out number by number."""
    D, group = head_dim, HEADS // kv_heads
    q: list[int] = []
    k: list[int] = []
    v: list[int] = []
    if model_type == "phi3":
        q = list(range(HEADS * D))
        k = list(range(HEADS * D, (HEADS + kv_heads) * D))
        v = list(range((HEADS + kv_heads) * D, (HEADS + 2 * kv_heads) * D))
    elif model_type in ("falcon", "gpt_bigcode"):
        row = 0
        for _ in range(kv_heads):
            q += range(row, row + group * D)
            k += range(row + group * D, row + (group + 1) * D)
            v += range(row + (group + 1) * D, row + (group + 2) * D)
            row += (group + 2) * D
    return q, k, v


FUSED = {"phi3": "qkv_proj", "falcon": "query_key_value", "gpt_bigcode": "attn.c_attn"}


def expected(name: str, old: Tensor, model_type: str, head_dim: int, kv_heads: int, new: int) -> Tensor | None:
    """The tensor ``name`` after mean-pooling; None if it disappears."""
    if model_type in FUSED and FUSED[model_type] in name:
        q, k, v = kv_rows(model_type, head_dim, kv_heads)
        parts = old[q], pooled(old[k], kv_heads, new), pooled(old[v], kv_heads, new)
        if model_type == "phi3":
            return torch.cat(parts)
        group, out = HEADS // new, []
        for g in range(new):
            out.append(parts[0][g * group * head_dim : (g + 1) * group * head_dim])
            out.extend(part[g * head_dim : (g + 1) * head_dim] for part in parts[1:])
        return torch.cat(out)
    if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
        return pooled(old, kv_heads, new)
    if model_type in (*FLAT_NORMS, "cohere") and ".k_norm." in name:
        return pooled(old, kv_heads, new)
    return old


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_mean_is_the_arithmetic_mean_and_all_else_is_kept(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    new = 1 if model_type == "gpt_bigcode" else 2
    model.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", kv_heads=new)
    before, after = tensors(tmp_path / "src"), tensors(tmp_path / "dst")
    changed = 0
    for name, old in before.items():
        if model_type == "stablelm" and "k_layernorm" in name:
            stem, _, head = name.removesuffix(".weight").rpartition(".")
            if int(head) < new:
                group = [before[f"{stem}.{i}.weight"] for i in range(int(head) * 4, int(head) * 4 + 4)]
                torch.testing.assert_close(after[name], sum(group) / 4)
                changed += 1
            else:
                assert name not in after
            continue
        want = expected(name, old, model_type, head_dim_of(model.config), HEADS, new)
        if want is old:
            assert torch.equal(after[name], old), name
        else:
            torch.testing.assert_close(after[name], want, rtol=1e-5, atol=1e-6)
            changed += 1
    assert changed >= model.config.num_hidden_layers
    loaded = reload(tmp_path / "dst", FAMILIES[model_type][0])
    cache = loaded(IDS, use_cache=True).past_key_values
    heads = HEADS if model_type == "falcon" else new  # Falcon expands K and V before it caches them
    assert cache.layers[0].keys.shape[1] == heads


def make_heads_equal(model: Any, model_type: str, groups: int) -> None:
    """Overwrite each group's K and V heads (and their norms) by the group's first, in place."""
    D, size = head_dim_of(model.config), HEADS // groups
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            index: list[int] | None = None
            if model_type in FUSED and FUSED[model_type] in name:
                _, k, v = kv_rows(model_type, D, HEADS)
                index = list(range(parameter.shape[0]))
                for rows in (k, v):
                    for h in range(HEADS):
                        for d in range(D):
                            index[rows[h * D + d]] = rows[h // size * size * D + d]
            elif any(part in name for part in (".k_proj.", ".v_proj.")) or (
                model_type in FLAT_NORMS and ".k_norm." in name
            ):
                index = [h // size * size * D + d for h in range(HEADS) for d in range(D)]
            elif model_type == "cohere" and ".k_norm." in name:
                index = [h // size * size for h in range(HEADS)]
            if index is not None:
                parameter.copy_(parameter[index].clone())
        if model_type == "stablelm":
            for layer in model.model.layers:
                norms = layer.self_attn.k_layernorm.norms
                for h in range(HEADS):
                    norms[h].weight.copy_(norms[h // size * size].weight)


#: one family of every layout
LAYOUTS = ["qwen2", "phi3", "falcon", "gpt_bigcode", "cohere", "stablelm", "olmo2"]


@pytest.mark.parametrize(
    ("model_type", "method"),
    [(m, "mean") for m in FAMILIES] + [(m, method) for method in ("first", "mean-norm") for m in LAYOUTS],
)
def test_equal_heads_lose_nothing(model_type: str, method: str, tmp_path: Path) -> None:
    """Invariant 3: where a group's heads agree, conversion keeps the logits, cached decoding included."""
    model = tiny_model(model_type)
    new = 1 if model_type == "gpt_bigcode" else 4
    make_heads_equal(model, model_type, new)
    model.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", kv_heads=new, method=method, check_load=False)
    loaded = reload(tmp_path / "dst", FAMILIES[model_type][0])
    with torch.no_grad():
        want = model(IDS).logits
        torch.testing.assert_close(loaded(IDS).logits, want, rtol=1e-4, atol=1e-5)
        first = loaded(IDS[:, :-1], use_cache=True)
        last = loaded(IDS[:, -1:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(last[:, -1], want[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [1, 2])
def test_falcon_with_one_query_key_value_per_head(new: int, tmp_path: Path) -> None:
    """The old layout (per head q, k, v) becomes multi_query or the new architecture."""
    changes: dict[str, Any] = {
        "new_decoder_architecture": False,
        "multi_query": False,
        "parallel_attn": True,
        "alibi": False,
    }
    model = tiny_model("falcon", **changes)
    make_heads_equal(model, "falcon", new)
    model.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", kv_heads=new)
    loaded = reload(tmp_path / "dst", "FalconForCausalLM")
    assert loaded.config.multi_query is (new == 1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_falcon_with_alibi_and_sequential_attention_becomes_multi_query_only(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "new_decoder_architecture": False,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
    }
    model = tiny_model("falcon", **changes)
    make_heads_equal(model, "falcon", 1)
    model.save_pretrained(tmp_path / "src")
    with pytest.raises(ConversionError, match="parallel_attn"):
        convert(tmp_path / "src", tmp_path / "dst", kv_heads=2)
    convert(tmp_path / "src", tmp_path / "dst", kv_heads=1)
    loaded = reload(tmp_path / "dst", "FalconForCausalLM")
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        want, got = model(IDS, attention_mask=mask).logits, loaded(IDS, attention_mask=mask).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert loaded(IDS, attention_mask=mask, use_cache=True).past_key_values.layers[0].keys.shape[1] == 1


def test_gpt_bigcode_refuses_two_heads(tmp_path: Path) -> None:
    tiny_model("gpt_bigcode").save_pretrained(tmp_path / "src")
    with pytest.raises(ConversionError, match="multi_query"):
        convert(tmp_path / "src", tmp_path / "dst", kv_heads=2)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "cohere", "stablelm", "falcon"])
def test_grouped_sources_merge_on(model_type: str, tmp_path: Path) -> None:
    """Invariant 7: 8 -> 4 -> 2 is 8 -> 2."""
    tiny_model(model_type, dtype=torch.float64).save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "four", kv_heads=4)
    convert(tmp_path / "four", tmp_path / "two", kv_heads=2)
    convert(tmp_path / "src", tmp_path / "direct", kv_heads=2)
    staged, direct = tensors(tmp_path / "two"), tensors(tmp_path / "direct")
    assert staged.keys() == direct.keys()
    for name in direct:
        torch.testing.assert_close(staged[name], direct[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("method", "clip", "told"), [("aligned", 8.0, True), ("mean", 8.0, False), ("aligned", None, False)]
)
def test_clipped_projections_are_told(tmp_path: Path, method: str, clip: float | None, told: bool) -> None:
    tiny_model("olmo", clip_qkv=clip).save_pretrained(tmp_path)
    said = [
        text for text in plan(tmp_path, 2, method=method).warnings if "clips queries, keys and values at 8:" in text
    ]
    assert len(said) == told
