"""The method ``aligned`` on checkpoints of every family: lossless where heads are one head in several bases."""

import pytest
import torch
import transformers
from shared_heads import KEYS_HAVE_A_NORM, share_heads
from tiny_families import FAMILIES, tiny_config

from hf_attn_patch.conversion import ConversionError, convert, plan


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
    notes = ["the keys of 2 layers are averaged"] if model_type in KEYS_HAVE_A_NORM else []
    assert [note.split(",")[0] for note in record["details"]["notes"]] == notes


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
