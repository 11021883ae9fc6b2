"""A small trained-like model, converted to fewer KV heads: what the tools are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_llama
from transformers import AutoModelForCausalLM

from hf_attn_patch.conversion import convert

HQ, HKV = 4, 2


@pytest.fixture(scope="session")
def multi_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multi-head checkpoint."""
    folder = tmp_path_factory.mktemp("multi-head") / "model"
    save_tiny(folder, tiny_llama(kv_heads=HQ))
    return folder


@pytest.fixture(scope="session")
def grouped(multi_head: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its conversion to two KV heads."""
    folder = tmp_path_factory.mktemp("grouped") / "model"
    convert(multi_head, folder, HKV, method="mean")
    return folder


@pytest.fixture
def load(grouped: Path) -> Any:
    """``load()``: the grouped model with our attention; ``load("eager")`` with another."""

    def load(implementation: str = "hf_attn_patch", **arguments: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(grouped, attn_implementation=implementation, **arguments).eval()

    return load


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows, the first padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 512, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": torch.where(mask == 1, ids, 0), "attention_mask": mask}
