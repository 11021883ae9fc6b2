"""Numbers of KV heads for layers, or types of layers, as transformers says them: ``per_layer_config``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import tensors
from every_family import class_of, config_of, known_here, model_of
from tiny import python_sources, trained_tokenizer
from tiny_families import FAMILIES, tiny_config

from hf_attn_patch.conversion import ConversionError, convert, inspect_source, kv_heads_under_budget
from hf_attn_patch.conversion.families.table import family_of

IDS = torch.tensor([[5, 9, 33, 2, 17, 60, 41]])
FOUR = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]


def gemma4(**changes: Any) -> Any:
    """Four layers of Gemma 4, of which the last reads the cache of the third."""
    return config_of("gemma4_text", layer_types=FOUR, **changes)


def step(**changes: Any) -> Any:
    kinds = ["sliding_attention", "full_attention"] * 2
    return config_of("step3p5", num_hidden_layers=4, layer_types=kinds, **changes)


def copied(small: Any, big: Any) -> None:
    """K and V of ``small`` repeated into ``big``, which has more heads in some layers; all else as it is."""
    old = dict(small.named_parameters())
    with torch.no_grad():
        for name, parameter in big.named_parameters():
            source = old[name]
            if source.shape != parameter.shape:
                D = small.config.per_layer_config[int(name.split("layers.")[1].split(".")[0])].head_dim
                times = len(parameter) // len(source)
                source = source.unflatten(0, (-1, D)).repeat_interleave(times, 0).flatten(0, 1)
            parameter.copy_(source)


def cache_heads(model: Any) -> list[int]:
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    return [layer.keys.shape[1] for layer in cache.layers if layer.keys is not None]


CASES = {
    "gemma4_text": (
        gemma4,
        [4, 4, 2],
        {
            "num_key_value_heads": 4,
            "per_layer_config": {i: {"head_dim": 8, "num_key_value_heads": 2} for i in (2, 3)},
        },
    ),
    "step3p5": (
        step,
        [4, 4, 4, 2],
        {
            "num_key_value_heads": 4,
            "per_layer_config": {
                0: {"num_attention_heads": 16}, 2: {"num_attention_heads": 16}, 3: {"num_key_value_heads": 2},
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", CASES)
def test_a_list_gives_what_transformers_builds_from_such_a_config(model_type: str, tmp_path: Path) -> None:
    """The truth is a model that transformers itself builds with these numbers; the source repeats its heads."""
    make, wanted, config = CASES[model_type]
    small, big = model_of(make(**config)), model_of(make(num_key_value_heads=8))
    copied(small, big)
    small.save_pretrained(tmp_path / "want")
    big.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", wanted, method="mean")
    expected, got = tensors(tmp_path / "want"), tensors(tmp_path / "dst")
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    again, info = type(small).from_pretrained(tmp_path / "dst", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IDS)[0], small(IDS)[0], rtol=1e-5, atol=1e-5)
    assert cache_heads(again)[: len(wanted)] == wanted
    facts = inspect_source(tmp_path / "dst")
    assert facts["attention"][0]["kv_heads"] == wanted
    # and on, to one number in all layers
    convert(tmp_path / "dst", tmp_path / "one", 1, method="mean")
    one = type(small).from_pretrained(tmp_path / "one")
    assert set(cache_heads(one)) == {1}


def test_a_checkpoint_that_names_the_number_of_its_full_layers(tmp_path: Path) -> None:
    """As Gemma 4's on the hub: num_global_key_value_heads and global_head_dim, no per_layer_config."""
    model = model_of(gemma4(num_global_key_value_heads=4, attention_k_eq_v=True))
    model.save_pretrained(tmp_path / "src")
    path = tmp_path / "src" / "config.json"
    raw = json.loads(path.read_text())
    del raw["per_layer_config"]
    path.write_text(json.dumps({**raw, "num_global_key_value_heads": 4, "global_head_dim": 8}))
    assert inspect_source(tmp_path / "src")["attention"][0]["kv_heads"] == [8, 8, 4]
    convert(tmp_path / "src", tmp_path / "dst", {"2": 2}, method="mean")
    again = type(model).from_pretrained(tmp_path / "dst")
    assert cache_heads(again)[:3] == [8, 8, 2]
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["num_global_key_value_heads"] == 2
    before, after = tensors(tmp_path / "src"), tensors(tmp_path / "dst")
    name = next(n for n in before if n.endswith("layers.2.self_attn.k_proj.weight"))
    assert name.replace("k_proj", "v_proj") not in before  # the keys are the values
    torch.testing.assert_close(after[name], before[name].unflatten(0, (2, 2, 8)).mean(1).flatten(0, 1))


def test_a_budget_goes_to_the_type_of_layer_that_needs_it(tmp_path: Path) -> None:
    """The heads of Gemma 4's full layers are alike, those of its sliding layers are not."""
    torch.manual_seed(0)
    model = model_of(gemma4(num_kv_shared_layers=0, vocab_size=512, vocab_size_per_layer_input=512))
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads = projection.weight.unflatten(0, (8, 8))
                heads[:] = heads[:1].clone()
    model.save_pretrained(tmp_path / "src")
    trained_tokenizer().save_pretrained(tmp_path / "src")
    (tmp_path / "text.txt").write_text("".join(p.read_text() for p in python_sources())[:20_000])
    known: dict[str, Any] = {
        "calibrate": str(tmp_path / "text.txt"),
        "calibration_tokens": 1500,
        "calibration_length": 16,
    }
    # a window of 8 keeps next to nothing of 8,192 tokens: the budget is all about the full layers
    assert kv_heads_under_budget(tmp_path / "src", 0.5, **known, device="cpu") == [8, 8, 1, 1]
    convert(tmp_path / "src", tmp_path / "dst", [8, 8, 1, 1], method="mean")
    again = type(model).from_pretrained(tmp_path / "dst").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS)[0], model(IDS)[0], rtol=1e-4, atol=1e-4)


def test_layers_of_one_type_have_one_number(tmp_path: Path) -> None:
    model_of(gemma4()).save_pretrained(tmp_path / "src")
    with pytest.raises(ConversionError, match="sliding_attention layers cannot have 4, 2"):
        convert(tmp_path / "src", tmp_path / "dst", [4, 2, 1], method="mean")


def test_mimos_sliding_layers_have_twice_as_many(tmp_path: Path) -> None:
    model = model_of(config_of("mimo_v2_flash"))
    model.save_pretrained(tmp_path / "src")
    assert inspect_source(tmp_path / "src")["attention"][0]["kv_heads"] == [16, 8]
    convert(tmp_path / "src", tmp_path / "dst", 1, method="mean")
    assert cache_heads(type(model).from_pretrained(tmp_path / "dst")) == [2, 1]
    for numbers, words in (([1, 1], "even in number"), ([8, 8], "one num_key_value_heads")):
        with pytest.raises(ConversionError, match=words):
            convert(tmp_path / "src", tmp_path / "no", numbers, method="mean")


def honours(config: Any) -> bool:
    """Whether the stock class builds its first layers' K with the numbers of their own configs."""
    try:
        config.per_layer_config = {**kept(config), 0: {**kept(config).get(0, {}), "num_key_value_heads": 4}}
        with torch.device("meta"):
            model = class_of(config)(config)
    except Exception:  # a class that reads it from the whole config, by whatever error
        return False
    rows = {
        int(name.split("layers.")[1].split(".")[0]): len(parameter)
        for name, parameter in model.named_parameters()
        if name.endswith("k_proj.weight") and "layers." in name
    }
    return rows.get(0) is not None and rows[0] * 2 == rows.get(1)


def kept(config: Any) -> dict[int, dict[str, Any]]:
    return {int(i): own for i, own in config.to_dict().get("per_layer_config", {}).items()}


@pytest.mark.parametrize("model_type", [*FAMILIES, *known_here()])
def test_rows_say_so_wherever_the_class_honours_it(model_type: str) -> None:
    """A class of a newer transformers that begins to honour it shows up here by name."""
    config = config_of(model_type) if model_type in known_here() else tiny_config(model_type)
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("unknown to this transformers")
    (stack, *_) = family_of(model_type).stacks
    if stack.kv_field.varies == "types":
        return  # told apart by the tests above: one number for a type
    assert honours(config) == (stack.kv_field.varies == "layers")
