"""Layers beside the model that draft further tokens: behind the last one, or under a name of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tensors
from every_family import config_of, known_here, model_of
from safetensors.torch import load_file, save_file

from hf_attn_patch.conversion import ConversionError, convert, plan, verify

IDS = torch.tensor([[5, 9, 33, 2, 17, 60, 41]])


def drafted(folder: Path, model_type: str, prefix: str, field: str | None) -> Any:
    """A checkpoint with one layer more, as its makers publish it."""
    model = model_of(config_of(model_type))
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    last = "model.layers.1."
    state |= {prefix + n.removeprefix(last): t.clone() for n, t in state.items() if n.startswith(last)}
    state[f"{prefix}eh_proj.weight"] = torch.ones(32, 64)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    if field:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: 1}))
    return model


CASES = [
    ("glm4_moe", "model.layers.2.", "num_nextn_predict_layers"),
    ("qwen3_next", "mtp.layers.0.", None),
    ("mimo_v2_flash", "model.mtp.layers.0.", "num_nextn_predict_layers"),
]


@pytest.mark.parametrize(("model_type", "prefix", "field"), [case for case in CASES if case[0] in known_here()])
def test_they_are_left_out_where_heads_change(model_type: str, prefix: str, field: str | None, tmp_path: Path) -> None:
    model = drafted(tmp_path / "src", model_type, prefix, field)
    made = plan(tmp_path / "src", 2, method="mean")
    assert any("draft further tokens" in warning for warning in made.warnings)
    convert(tmp_path / "src", tmp_path / "dst", 2, method="mean")
    own = {name for name in tensors(tmp_path / "src") if not name.startswith(prefix)}
    assert tensors(tmp_path / "dst").keys() == own
    again, info = type(model).from_pretrained(tmp_path / "dst", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again(IDS).logits.isfinite().all()
    assert verify(tmp_path / "src", tmp_path / "dst").ok
    if field:
        assert json.loads((tmp_path / "dst" / "config.json").read_text())[field] == 0


def test_they_stay_where_nothing_changes(tmp_path: Path) -> None:
    drafted(tmp_path / "src", "glm4_moe", *CASES[0][1:])
    convert(tmp_path / "src", tmp_path / "dst", 8, method="mean")
    assert tensors(tmp_path / "src").keys() == tensors(tmp_path / "dst").keys()


def test_a_layer_that_no_config_counts_is_refused(tmp_path: Path) -> None:
    drafted(tmp_path / "src", "glm4_moe", CASES[0][1], None)
    path = tmp_path / "src" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in raw.items() if "mtp" not in k and "nextn" not in k}))
    with pytest.raises(ConversionError, match="says 2 layers"):
        convert(tmp_path / "src", tmp_path / "dst", 2, method="mean")


@pytest.mark.skipif("step3p5" not in known_here(), reason="unknown to this transformers")
def test_step_as_it_is_published(tmp_path: Path) -> None:
    """Its KV heads under another name, its lists of layers padded by the drafting ones, its sliding layers apart."""
    model = drafted(tmp_path / "src", "step3p5", "model.layers.2.", None)
    path = tmp_path / "src" / "config.json"
    raw = {k: v for k, v in json.loads(path.read_text()).items() if "mtp" not in k and k != "per_layer_config"}
    sliding = {"num_attention_heads": raw.pop("num_sliding_attention_heads"), "num_attention_groups": 8}
    raw |= {"num_attention_groups": raw.pop("num_key_value_heads"), "attention_other_setting": sliding}
    raw |= {"num_nextn_predict_layers": 1, "layer_types": [*raw["layer_types"], "sliding_attention"]}
    path.write_text(json.dumps({**raw, "mlp_layer_types": ["dense"] * 3}))
    convert(tmp_path / "src", tmp_path / "dst", 2, method="mean")
    again, info = type(model).from_pretrained(tmp_path / "dst", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert [layer.self_attn.k_proj.out_features for layer in again.layers] == [8, 8]
    written = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert "num_attention_groups" not in written
    assert written["attention_other_setting"]["num_attention_groups"] == 2  # what other readers go by
