"""What `pip install hf-attn-patch` brings is enough: nothing that only the tests' environment has is needed."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tiny import save_tiny, tiny_llama

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]


def brought() -> set[str]:
    """The distributions that the package's own requirements bring, and theirs, extras aside."""
    found: set[str] = set()
    todo = [tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
    while todo:
        for wanted in map(Requirement, todo.pop()):
            name = wanted.name.lower().replace("_", "-")
            if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
                continue
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:  # platform things, such as CUDA's libraries of a CPU build
                continue
            found.add(name)
            todo.append(metadata.requires(name) or [])
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import from that has the package and what it brings, and no more."""
    folder = tmp_path_factory.mktemp("site")
    for name in brought():
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or () if not path.parts[0].startswith("..")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    package = shutil.copytree(ROOT / "hf_attn_patch", folder / "hf_attn_patch")
    for part in ("modeling", "conversion"):
        shutil.copytree(ROOT / part, package / part)
    return folder


def run(site: Path, where: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


WORK = """
import importlib.util
assert importlib.util.find_spec("datasets") is None and importlib.util.find_spec("peft") is None
from click.testing import CliRunner
from hf_attn_patch import enable  # before anything of transformers
from hf_attn_patch.cli import main
for line in (
    "env", "inspect mha", "convert mha gqa --kv-heads 2", "verify mha gqa",
    "convert mha fitted --kv-heads 2 --calibrate text.txt --calibration-tokens 400",
    "evaluate gqa --source mha --text text.txt --tokens 60 --no-speed",
):
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == 0, (line, result.output)
from transformers import AutoModelForCausalLM, AutoTokenizer
model = enable(AutoModelForCausalLM.from_pretrained("gqa"), cache="growing")
words = AutoTokenizer.from_pretrained("gqa")("def f():", return_tensors="pt")
print(model.generate(**words, max_new_tokens=3, do_sample=False).shape[1] - words["input_ids"].shape[1])
"""


def test_the_requirements_are_enough(site: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "mha", tiny_llama(kv_heads=4))
    (tmp_path / "text.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    assert run(site, tmp_path, WORK).split()[-1] == "3"


def test_what_transformers_registers_does_not_import_it_back(site: Path, tmp_path: Path) -> None:
    """Otherwise ``from hf_attn_patch import enable`` fails in a process that has not imported transformers yet."""
    code = "import sys, hf_attn_patch.hf.mask_function; print('transformers.modeling_utils' in sys.modules)"
    assert run(site, tmp_path, code).split()[-1] == "False"
