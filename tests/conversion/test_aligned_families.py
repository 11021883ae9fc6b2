"""The method ``aligned`` on checkpoints of every family: lossless where heads are one head in several bases."""

from pathlib import Path

import pytest
import torch
import transformers
from hf_attn_patch.conversion import ConversionError, convert, plan
from hf_attn_patch.conversion.engine import from_heads, to_heads
from hf_attn_patch.conversion.planner import Plan, replace
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, tiny_config

#: a norm between projection and scores knows the basis of K: there heads are made equal instead
KEYS_HAVE_A_NORM = {
    "qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3", "olmoe", "stablelm",
    "cohere", "exaone4", "exaone_moe", "apertus", "flex_olmo", "hunyuan_v1_dense", "minimax_m2",
}  # fmt: skip


def random_turns(rope: str, rotary: int, heads: int, D: int) -> torch.Tensor:
    """[heads, D, D]: a turn and a scale in each rotary plane, any rotation among the free dimensions."""
    turns = torch.zeros(heads, D, D)
    for h in range(heads):
        for j in range(rotary // 2):
            a, b = (j, j + rotary // 2) if rope == "half" else (2 * j, 2 * j + 1)
            angle, scale = 6.3 * torch.rand(()), 0.5 + torch.rand(())
            turns[h, a, a] = turns[h, b, b] = scale * angle.cos()
            turns[h, a, b], turns[h, b, a] = -scale * angle.sin(), scale * angle.sin()
        free = D - rotary
        turns[h, rotary:, rotary:] = torch.linalg.qr(torch.randn(free, free))[0]
    return turns


def share_heads(made: Plan, folder: Path, new: int, keys: bool) -> None:
    """Rewrite the checkpoint so that the KV heads of each group are one head, each in a basis of its own."""
    state = load_file(folder / "model.safetensors")
    for unit in made.units:
        layer = unit.layer
        weights = to_heads(unit, {name: state[name] for name in unit.reads})
        D, HKV = layer.head_dim, layer.kv_heads
        of = [h - h % (HKV // new) for h in range(HKV)]
        turns = {
            "k": random_turns(layer.rope, layer.rotary_dims, HKV, D) if keys else torch.eye(D).expand(HKV, D, D),
            "v": torch.linalg.qr(torch.randn(HKV, D, D))[0],
        }
        for name, M in turns.items():
            setattr(weights, name, M @ getattr(weights, name)[of])
            if getattr(weights, f"{name}_bias") is not None:
                setattr(weights, f"{name}_bias", (M @ getattr(weights, f"{name}_bias")[of][..., None])[..., 0])
        same = replace(layer, new_kv_heads=HKV)
        state.update({n: t.contiguous() for n, t in from_heads(replace(unit, layer=same), weights).items()})
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_lossless_where_heads_are_one_in_several_bases(model_type, tmp_path):
    torch.manual_seed(0)
    kind = getattr(transformers, FAMILIES[model_type][0])
    new = 1 if model_type == "gpt_bigcode" else 2
    source = kind(tiny_config(model_type))
    for name, parameter in source.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    source.save_pretrained(tmp_path / "src")
    made = plan(tmp_path / "src", new, method="aligned")
    share_heads(made, tmp_path / "src", new, keys=model_type not in KEYS_HAVE_A_NORM)
    record = convert(tmp_path / "src", tmp_path / "dst", new, method="aligned")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before, after = (kind.from_pretrained(tmp_path / d).eval()(ids).logits for d in ("src", "dst"))
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())
    assert len(record["details"]["keys_averaged"]) == (2 if model_type in KEYS_HAVE_A_NORM else 0)


def test_similar_grouping_finds_heads_that_are_apart(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny_config("llama"))
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            for tensor in getattr(layer.self_attn, name).parameters():
                heads = tensor.data.unflatten(0, (8, -1))
                heads[4:] = heads[:4]
    model.save_pretrained(tmp_path / "src")
    ids = torch.arange(20)[None]
    losses = {}
    for group in ("adjacent", "similar"):
        convert(tmp_path / "src", tmp_path / group, 4, method="aligned", group=group)
        after = transformers.LlamaForCausalLM.from_pretrained(tmp_path / group)(ids).logits
        losses[group] = float((after - model(ids).logits).abs().max().detach())
    assert losses["similar"] < 1e-5 < 1e-3 < losses["adjacent"]


def test_an_unknown_grouping_is_refused(tmp_path):
    transformers.LlamaForCausalLM(tiny_config("llama")).save_pretrained(tmp_path / "src")
    with pytest.raises(ConversionError, match="adjacent, similar"):
        convert(tmp_path / "src", tmp_path / "dst", 2, method="aligned", group="closest")
    assert not (tmp_path / "dst").exists()
