"""The Dockerfile without docker: its stages parse, install what README says, and name what is there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from hf_attn_patch.cli.main import COMMANDS

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: stage -> the extras that it has beside those for training and figures
STAGES = {"cpu": set(), "cuda": {"flash"}}


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions, after the FROM, as (word, rest); comments gone, continued lines joined."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in filter(str.strip, kept.replace("\\\n", " ").splitlines()):
        word, rest = line.split(maxsplit=1)
        assert word in {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "ENTRYPOINT", "CMD"}, line
        if word == "FROM":
            image, as_, name = rest.split()
            assert as_ == "AS" and name not in found, line
            found[name] = [("IMAGE", image)]
        else:
            found[name].append((word, rest))
    return found


FOUND = stages((ROOT / "Dockerfile").read_text(encoding="utf-8"))


def test_stages() -> None:
    assert set(FOUND) == set(STAGES)
    for name in STAGES:
        assert f"docker build --target {name} " in README


@pytest.mark.parametrize("name", STAGES)
def test_it_installs_what_readme_says(name: str) -> None:
    assert f"pip install {PROJECT['name']} " in README
    lines = [shlex.split(part) for word, rest in FOUND[name] if word == "RUN" for part in rest.split("&&")]
    installed = [words for words in lines if words[:2] == ["pip", "install"]]
    ours = [word for words in installed for word in words if word.startswith(PROJECT["name"])]
    assert len(ours) == 1
    package, _, extras = ours[0].rstrip("]").partition("[")
    assert package == PROJECT["name"]
    assert set(extras.split(",")) == {"train", "plot"} | STAGES[name]
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    if name == "cpu":  # before anything that asks for torch, or the one with CUDA comes along
        assert installed[0][:4] == ["pip", "install", "--no-cache-dir", "torch"] and installed[0][-1].endswith(
            "/whl/cpu"
        )


@pytest.mark.parametrize("name", STAGES)
def test_what_it_names_is_there(name: str) -> None:
    image = FOUND[name][0][1]
    version = re.fullmatch(r"python:(3\.\d+)-slim", image)
    assert version and f'"{version[1]}"' in (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    last = dict(FOUND[name])
    (entry,), (command,) = json.loads(last["ENTRYPOINT"]), json.loads(last["CMD"])
    assert entry in PROJECT["scripts"] and command in COMMANDS
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in (rest.split()[0] for word, rest in FOUND[name] if word == "COPY"):
        assert (ROOT / source).exists() and source in allowed
