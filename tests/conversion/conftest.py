"""What several files share. Most tests here are about means of heads, written out by hand; those about calibration keep
the real default."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_families import tiny_model

from hf_attn_patch.conversion.methods import registry as methods


@pytest.fixture(autouse=True, scope="module")
def _pooling(request: pytest.FixtureRequest) -> Iterator[None]:
    default = methods.DEFAULT
    if "calibration" not in request.path.parts and request.path.name != "test_kv_budget.py":
        methods.DEFAULT = "mean"
    yield
    methods.DEFAULT = default


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    model = tiny_model("llama")
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    return folder


@pytest.fixture
def src(sources: Path, tmp_path: Path) -> Path:
    shutil.copytree(sources / "single", tmp_path / "src")
    return tmp_path / "src"


@pytest.fixture
def sharded(sources: Path, tmp_path: Path) -> Path:
    shutil.copytree(sources / "sharded", tmp_path / "src")
    return tmp_path / "src"
