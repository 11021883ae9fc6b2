"""The versions that were tested are said once, and are those that the tests run with."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from hf_attn_patch.cli.main import main
from hf_attn_patch.compat.ground import TESTED

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(TESTED.keys() - {"python"})


def name_of(requirement: Requirement) -> str:
    return requirement.name.replace("-", "_")


def versions(file: str) -> dict[str, str]:
    """The pins for Python 3.11 and newer."""
    lines = (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    kept = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": "3.11"})]
    return {name_of(pin): str(pin.specifier).removeprefix("==") for pin in kept}


def minimums() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(line) for group in wanted for line in group]
    return {name_of(one): str(one.specifier).removeprefix(">=") for one in found if one.specifier}


def two(version: str) -> str:
    return ".".join([*version.split("."), "0"][:2])


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tested_versions_are_those_of_the_tests(package: str) -> None:
    oldest, newest = TESTED[package]
    assert newest == two(versions("tested.txt")[package])
    assert oldest == two(minimums()[package])


def test_the_oldest_transformers_is_tested() -> None:
    assert two(versions("oldest.txt")["transformers"]) == TESTED["transformers"][0]
    python = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert python == f">={TESTED['python'][0]}"


def test_env_warns_above_the_newest_that_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = versions("tested.txt")
    installed = pins | {"torch": f"{TESTED['torch'][1]}.9+cpu", "transformers": "99.1.0", "peft": "0.1.0"}
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: installed.get(name.replace("-", "_")) or version(name)
    )
    said = CliRunner().invoke(main, ["env"])
    assert said.exit_code == 0
    (line,) = [line for line in said.stdout.splitlines() if "newer than" in line]
    assert line.split()[:2] == ["transformers", "99.1.0"]
    assert f"newer than {TESTED['transformers'][1]}, the newest that was tested" in line
    assert 'pip install "transformers>=5.17,<5.25"' in said.stderr
    found = json.loads(CliRunner().invoke(main, ["env", "--json"]).stdout)
    assert found["newer_than_tested"] == {"transformers": TESTED["transformers"][1]}


def test_env_warns_of_nothing_that_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = versions("tested.txt")
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: pins.get(name.replace("-", "_")) or version(name))
    said = CliRunner().invoke(main, ["env"])
    assert "newer than" not in said.output
