"""The KV cache of models whose layers do not keep every token, in bytes worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import run
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    WhisperConfig,
    WhisperModel,
)

from hf_attn_patch.conversion import inspect_source

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 8}
GEMMA = Gemma3TextConfig(**SIZES, num_hidden_layers=6, num_key_value_heads=2, sliding_window=512)
MISTRAL = MistralConfig(**SIZES, num_hidden_layers=3, num_key_value_heads=2, sliding_window=100)
ROW = 2 * 2 * 8 * 4  # K and V, 2 heads of 8, fp32


@pytest.mark.parametrize(
    ("model", "config", "context", "wanted"),
    [
        (Gemma3ForCausalLM, GEMMA, 8192, ROW * (5 * 512 + 8192)),  # every sixth layer sees all
        (Gemma3ForCausalLM, GEMMA, 300, ROW * 6 * 300),
        (MistralForCausalLM, MISTRAL, 4000, ROW * 3 * 100),
    ],
)
def test_inspect_counts_what_is_kept(model: type, config: object, context: int, wanted: int, tmp_path: Path) -> None:
    model(config).save_pretrained(tmp_path / "src")
    facts = json.loads(run("inspect", tmp_path / "src", "--json", "--context", context).stdout)
    assert facts["kv_bytes_at_context"] == wanted
    assert facts["kv_bytes_per_token"] == wanted // context
    half = next(c for c in facts["choices"] if c["kv_heads"] == 1)
    assert half["kv_bytes_at_context"] == wanted // 2 and half["kv_share"] == 0.5
    shown = run("inspect", tmp_path / "src", "--context", context).stdout
    assert ("layers keep" in shown) == (context > 300)


def test_dry_runs_and_cards_count_the_same(tmp_path: Path) -> None:
    Gemma3ForCausalLM(GEMMA).save_pretrained(tmp_path / "src")
    plan = json.loads(run("convert", tmp_path / "src", "--kv-heads", 1, "--dry-run", "--json").stdout)
    per_token = ROW * (5 * 512 + 8192) // 8192
    assert plan["kv_bytes_per_token"] == {"before": per_token, "after": per_token // 2}
    assert any("5 of 6 layers keep 512 tokens" in warning for warning in plan["warnings"])
    assert run("convert", tmp_path / "src", tmp_path / "dst", "--kv-heads", 1, "-q", "--method", "mean").exit_code == 0
    assert f"{per_token // 2} B" in (tmp_path / "dst" / "README.md").read_text()


def test_a_cache_is_sized_for_what_the_model_can_read(tmp_path: Path) -> None:
    """By hand: 448 tokens of a Whisper, whose cross-attention keeps what 1,500 positions heard from the first on."""
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "encoder_layers": 1}
    WhisperModel(WhisperConfig(**sizes, encoder_attention_heads=4)).save_pretrained(tmp_path / "whisper")
    wanted = 2 * 32 * 4 * (448 + 1500)
    facts = json.loads(run("inspect", tmp_path / "whisper", "--json").stdout)
    assert (facts["context"], facts["kv_bytes_at_context"]) == (448, wanted) and not facts["warnings"]
    assert facts["choices"][0]["kv_bytes_over_context"][1] == 2 * 32 * 4 * (448 // 64 + 1500)
    dry = json.loads(run("convert", tmp_path / "whisper", "--kv-heads", 1, "--dry-run", "--json").stdout)
    assert (dry["context"], dry["kv_bytes_per_token"]) == (448, {"before": wanted // 448, "after": wanted // 448 // 4})
    short = MistralConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=2, max_position_embeddings=64)
    MistralForCausalLM(short).save_pretrained(tmp_path / "mistral")
    assert inspect_source(tmp_path / "mistral")["context"] == 64
    asked = inspect_source(tmp_path / "mistral", 100)
    assert asked["context"] == 100 and asked["warnings"] == ["the model reads 64 tokens at most, by its config"]


def test_the_real_gemma(tmp_path: Path) -> None:
    """Gemma 3 270M: 18 layers, 3 of which see all, 1 KV head of 256; fp32: 66 MB at 8,192 tokens."""
    from hf_attn_patch.conversion.families.layer import stack_layers
    from hf_attn_patch.conversion.families.table import family_of
    from hf_attn_patch.conversion.reports.report import kv_cache_bytes

    config = Gemma3TextConfig(
        num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1, head_dim=256, hidden_size=640,
        sliding_window=512,
    )  # fmt: skip
    layers = stack_layers(family_of("gemma3_text").stacks[0], config, "config.json")
    assert kv_cache_bytes(layers, 4, new=False, tokens=8192) == 2 * 256 * 4 * (15 * 512 + 3 * 8192)


def test_encoders_can_be_planned(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    BertModel(BertConfig(**sizes, num_hidden_layers=2)).save_pretrained(tmp_path / "src")
    for more in ((), ("--json",)):
        done = run("convert", tmp_path / "src", "--kv-heads", 2, "--dry-run", *more)
        assert done.exit_code == 0, done.output
    assert (
        "an encoder keeps no keys and values" in run("convert", tmp_path / "src", "--kv-heads", 2, "--dry-run").stdout
    )
