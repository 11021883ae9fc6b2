"""The bound on a sequence is where a model fails, and not one token before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_attn_patch.documents.positions import BEHIND_PADDING, positions_of

SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 24,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "roberta": {}, "xlm-roberta": {"pad_token_id": 3}, "camembert": {}, "mpnet": {"pad_token_id": 5}, "bert": {},
    "roberta-prelayernorm": {}, "xlm-roberta-xl": {}, "data2vec-text": {}, "electra": {}, "xmod": {"languages": ["en"]},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24},
    "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16},
    "biogpt": {},
}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_the_last_position_is_the_last_that_works(family: str) -> None:
    config = transformers.AutoConfig.for_model(family, **SMALL, **CONFIGS[family])
    if family == "xmod":
        config.default_language = "en"
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    most = positions_of(config)
    assert most is not None
    # no id is the padding's, which has no position
    assert model(input_ids=torch.full((1, most), 9)).last_hidden_state.isfinite().all()
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(input_ids=torch.full((1, most + 1), 9))


def test_rotary_models_have_what_the_config_says() -> None:
    assert positions_of(transformers.LlamaConfig(max_position_embeddings=77)) == 77
    assert positions_of(transformers.EsmConfig(position_embedding_type="rotary", max_position_embeddings=77)) == 77
    assert positions_of(transformers.T5Config()) is None


def test_no_family_of_that_kind_is_left_out() -> None:
    """In transformers' sources: learned positions that have a padding index."""
    found = set()
    folder = Path(transformers.__file__).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        learned = re.search(r"self\.position_embeddings = \w*Embedding\([^)]*padding_idx", text)
        if learned and "create_position_ids_from_input_ids" in text:
            found.add(path.parent.name.replace("-", "_"))
    known = {name.replace("-", "_").removesuffix("_text_model").removesuffix("_text") for name in BEHIND_PADDING}
    no_language_models = {"pp_doclayout_v2", "evolla"}
    assert found and found <= known | no_language_models, found - known
    assert {name for name in BEHIND_PADDING if name not in CONFIG_MAPPING_NAMES} <= {
        "altclip_text_model", "bridgetower_text_model", "clap_text_model"
    }  # fmt: skip
