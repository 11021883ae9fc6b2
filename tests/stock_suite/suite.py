"""transformers' own model tests, on the tiny families of tests/helpers: what `run.py` hands to pytest.

``HF_ATTN_STOCK_TESTS`` is the folder of transformers' source distribution, ``HF_ATTN_STOCK_WITH`` is "sdpa" or "ours":
with "ours" every model that would take sdpa takes our attention, so that what these tests say of sdpa, they say of us.
The source distribution has the tests that all models share, and neither those of generation nor of export: these are
empty here.
"""

from __future__ import annotations

import os
import sys
import types
import unittest
from typing import Any

import torch
import transformers

SOURCE = os.environ["HF_ATTN_STOCK_TESTS"]
sys.path[:0] = [SOURCE, os.path.join(os.path.dirname(__file__), "..", "helpers")]
#: what the source distribution leaves out
for module, name in (
    ("exporters.test_export", "ExportTesterMixin"),
    ("generation.test_utils", "GenerationTesterMixin"),
):
    stub = types.ModuleType(f"tests.{module}")
    setattr(stub, name, type(name, (), {}))
    sys.modules[f"tests.{module.split('.')[0]}"] = types.ModuleType(f"tests.{module.split('.')[0]}")
    sys.modules[f"tests.{module}"] = stub

from families import FAMILIES, Family  # noqa: E402
from family_inputs import make_inputs  # noqa: E402
from tests.generation.test_utils import GenerationTesterMixin  # type: ignore[import-not-found]  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin  # type: ignore[import-not-found]  # noqa: E402

if os.environ["HF_ATTN_STOCK_WITH"] == "ours":
    import hf_attn_patch

    stock = transformers.AttentionInterface()["sdpa"]
    hf_attn_patch.override("sdpa")
    assert transformers.AttentionInterface()["sdpa"] is not stock


class Tester:
    """What transformers' mixin asks of a family: a config and inputs."""

    is_training = True

    def __init__(self, parent: unittest.TestCase, family: Family) -> None:
        self.parent, self.family = parent, family
        config = self.get_config()
        text = config.get_text_config()
        self.batch_size, self.seq_length = 3, 14
        self.hidden_size, self.num_hidden_layers = text.hidden_size, text.num_hidden_layers
        self.num_attention_heads = text.num_attention_heads

    def get_config(self) -> Any:
        return getattr(transformers, self.family.config)(**self.family.options)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.get_config(), dict(
            make_inputs(self.family, "ones" if self.family.kind != "vision" else "none").kwargs
        )


def _case(family: Family) -> type:
    model = getattr(transformers, family.model)
    bases = (ModelTesterMixin, GenerationTesterMixin) if model.can_generate() else (ModelTesterMixin,)
    return type(
        f"Test_{family.name}",
        (*bases, unittest.TestCase),
        {
            "all_model_classes": (model,),
            "is_encoder_decoder": family.kind == "encoder-decoder",
            "setUp": lambda self: setattr(self, "model_tester", Tester(self, family)),
        },
    )


for family in FAMILIES.values():
    globals()[f"Test_{family.name}"] = _case(family)
