"""SRC on the hub and --push-to-hub, with a hub that is played by a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner
from huggingface_hub import errors
from tiny_families import tiny_model

from hf_attn_patch.cli import main


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    folder = tmp_path / "models--org--model" / "snapshots" / "0a1b2c"
    tiny_model("llama").save_pretrained(folder)
    return folder


def test_a_hub_id_is_fetched_and_recorded(snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(repo_id: str, **arguments: Any) -> str:
        asked.update(arguments, repo_id=repo_id)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    command = ["convert", "org/model", str(tmp_path / "dst"), "--kv-heads", "2", "--revision", "v1"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert (asked["repo_id"], asked["revision"]) == ("org/model", "v1")
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    record = json.loads((tmp_path / "dst" / "conversion.json").read_text())
    assert record["source"]["name"] == "org/model"
    assert record["source"]["revision"] == "0a1b2c"
    assert "base_model: org/model" in (tmp_path / "dst" / "README.md").read_text()
    (snapshot / "2_Dense").mkdir()  # sentence-transformers' layer, its pickled weights not fetched
    (snapshot / "2_Dense" / "config.json").write_text('{"in_features": 32}')
    refused = CliRunner().invoke(main, [*command, "--overwrite"])
    assert refused.exit_code == 2 and "2_Dense has no weights" in refused.output and "--allow-pickle" in refused.output
    CliRunner().invoke(main, [*command, "--overwrite", "--allow-pickle"])
    assert "[1-9]_*/pytorch_model.bin" in asked["allow_patterns"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalEntryNotFoundError("x"), "cannot be reached"),
        (
            errors.RepositoryNotFoundError("x", response=cast(Any, SimpleNamespace(headers={}, request=None))),
            "no such model",
        ),
        (errors.HFValidationError("x"), "valid hub id"),
        (OSError("odd"), "odd"),
    ],
)
def test_what_the_hub_answers(error: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    result = CliRunner().invoke(main, ["convert", "org/model", str(tmp_path / "dst"), "--kv-heads", "2"])
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


class Hub:
    """Takes uploads into a folder."""

    folder: Path

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> Any:
        assert private
        if repo_id == "taken/name":
            raise OSError("you have no access")
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, self.folder / repo_id)


def test_push_to_hub(snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub.folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    command = ["convert", str(snapshot), str(tmp_path / "a"), "--kv-heads", "2", "--private", "--push-to-hub"]
    result = CliRunner().invoke(main, [*command, "me/mine"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "hub" / "me" / "mine" / "config.json").exists()
    command[2] = str(tmp_path / "b")
    result = CliRunner().invoke(main, [*command, "taken/name"])
    assert result.exit_code == 2
    assert "is converted, but could not be pushed" in result.stderr
    assert (tmp_path / "b" / "config.json").exists()
