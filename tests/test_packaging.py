"""The wheel holds what the tree holds, and nothing of the tree is missing from the list of packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "hf_attn_patch": "hf_attn_patch",
    "modeling": "hf_attn_patch/modeling",
    "conversion": "hf_attn_patch/conversion",
}


def tree() -> set[str]:
    """Every file of the three folders under the name it has in the wheel."""
    found = set()
    for folder, inside in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found.add(f"{inside}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


def test_the_list_of_packages_is_complete() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({Path(name).parent.as_posix().replace("/", ".") for name in tree()})


def test_pre_releases_are_named_where_there_is_nothing_else() -> None:
    """pip takes a pre-release of a package only where the requirement names one, or all that fit are pre-releases."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = [Requirement(line) for lines in extras.values() for line in lines if line.startswith("flash-attn-4")]
    assert found
    for requirement in found:
        assert requirement.specifier.prereleases
        assert next(requirement.specifier.filter(["0.0.1", "4.0.0b36"])) == "4.0.0b36"


def test_the_wheel_holds_what_the_tree_holds(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"  # building in place would leave build/ behind
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "-w", str(tmp_path), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {name for name in names if ".dist-info/" not in name} == tree()
    assert "hf-attn = hf_attn_patch.cli:main" in entry_points
    assert any(name.endswith("/licenses/LICENSE") for name in names)


BUILD_SDIST = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"


def test_the_sdist_holds_what_git_holds(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    for name in files:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    command = [sys.executable, "-c", BUILD_SDIST, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path / "tree", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        held = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in held if ".egg-info/" in name)}
    assert held - made == files - {".gitignore"}


def test_version_is_the_same_everywhere() -> None:
    import hf_attn_patch

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert hf_attn_patch.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_bug_report_asks_for_the_environment() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    first = form["body"][0]
    assert "hf-attn env" in first["attributes"]["label"] and first["validations"]["required"]


def test_pre_commit_runs_the_ruff_that_ci_runs() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (revision,) = (repo["rev"] for repo in repos if "ruff" in repo["repo"])
    assert f"ruff=={revision.removeprefix('v')}\n" in (ROOT / "requirements/tested.txt").read_text()


def test_a_tag_must_agree_with_the_version_and_the_changelog() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    by_hand = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }  # not by a make around it

    def check(*tag: str) -> subprocess.CompletedProcess[str]:
        run = ["make", "-s", "release-check", *tag]
        return subprocess.run(run, cwd=ROOT, env=by_hand, capture_output=True, text=True, check=False)

    wrong, none = check("TAG=v99.0.0"), check()
    assert wrong.returncode != 0 and "v99.0.0" in wrong.stdout
    assert none.returncode != 0 and none.stdout == "say which tag: make release-check TAG=v1.2.3\n"
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert workflow["publish"]["permissions"] == {"id-token": "write"} and set(workflow["publish"]["needs"]) == {
        "build",
        "test",
    }


def test_workflows_run_targets_that_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    wanted: set[str] = set()
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            matrix = job.get("strategy", {}).get("matrix", {})
            wanted.update([*matrix.get("target", []), *(one.get("target") for one in matrix.get("include", []))])
            for step in job["steps"]:
                wanted.update(re.findall(r"\bmake ([a-z-]+)", step.get("run", "")))
    wanted.discard(None)
    assert {"test-newest", "test-oldest", "lint", "unit", "test"} <= wanted
    assert wanted <= targets


def test_the_readme_is_whole_on_the_packages_page() -> None:
    """Its links are absolute, lead below the repository that pyproject.toml names, and to files that are there."""
    import re

    home = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    raw = home.replace("https://github.com/", "https://raw.githubusercontent.com/")
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
    own = [link for link in links if not link.startswith(("#", "https://arxiv.org/"))]
    assert len(own) > 10
    for link in own:
        start = next((p for p in (f"{home}/blob/main/", f"{raw}/main/") if link.startswith(p)), None)
        assert start is not None, link
        assert (ROOT / link.removeprefix(start).split("#")[0]).exists(), link
