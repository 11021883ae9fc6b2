"""Imports point one way: which room may import which, no circle anywhere; lazy imports and those for types count."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = "hf_attn_patch"
FOLDERS = {NAME: ROOT / NAME, f"{NAME}.modeling": ROOT / "modeling", f"{NAME}.conversion": ROOT / "conversion"}

#: room -> the rooms that it may import, beside itself
EVERYWHERE = {"compat", "errors", "grouping", "handle", "moved", "standalone"}
ATTN = {"attn"}
HF = {"hf", *ATTN}
DECODING = {"decoding", "cache", *HF}
ENABLE = {"enabling", "modeling", *DECODING}
SHARED = {"documents", "losses", *ENABLE}
MAY = {
    "errors": set(),
    "moved": set(),
    "handle": set(),
    "standalone": set(),
    "grouping": {"errors"},
    "compat": {"errors", "grouping"},
    "attn": EVERYWHERE,
    "hf": ATTN | EVERYWHERE,
    "cache": ATTN | EVERYWHERE,
    "decoding": DECODING | EVERYWHERE,
    "modeling": HF | EVERYWHERE,
    "enabling": ENABLE | EVERYWHERE,
    "explaining": ENABLE | EVERYWHERE,
    "documents": ENABLE | EVERYWHERE,
    "losses": ENABLE | EVERYWHERE,
    "conversion": SHARED | EVERYWHERE | {""},
    "training": SHARED | EVERYWHERE | {""},
    "cli": {"conversion", "training"} | SHARED | EVERYWHERE | {""},
    "__main__": {"cli"},
    # the package itself: it registers, and finds public names where they are
    "": {"hf", "attn", "cache", "enabling", "explaining", *EVERYWHERE},
}


def module_of(folder_name: str, path: Path) -> str:
    parts = [folder_name, *path.relative_to(FOLDERS[folder_name]).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


@cache
def sources() -> dict[str, Path]:
    return {
        module_of(name, path): path
        for name, folder in FOLDERS.items()
        for path in folder.rglob("*.py")
        if "__pycache__" not in path.parts
    }


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> the modules of ours that any line of it imports, wherever the line is."""
    found: dict[str, frozenset[str]] = {}
    for module, path in sources().items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                stem = ".".join([*base, *([node.module] if node.module else [])])
                inner = {f"{stem}.{alias.name}" for alias in node.names}
                names |= {name if name in sources() else stem for name in inner}
        found[module] = frozenset(name for name in names if name.split(".")[0] == NAME and name != module)
    return found


def room_of(module: str) -> str:
    return ([*module.split("."), ""])[1]


def test_every_import_is_of_a_module_that_is_there() -> None:
    assert len(sources()) > 100
    missing = {(module, name) for module, names in imports().items() for name in names if name not in sources()}
    assert not missing


def test_rooms_import_what_they_may() -> None:
    rooms = {room_of(module) for module in sources()}
    assert rooms == set(MAY)
    back = [
        f"{module} imports {name}"
        for module, names in sorted(imports().items())
        for name in sorted(names)
        if room_of(name) not in {room_of(module), *MAY[room_of(module)]}
    ]
    assert not back, "\n".join(back)


def test_what_rooms_may_goes_one_way() -> None:
    """But for the package itself, which rooms at the top import for what it registers, and for its version."""
    TopologicalSorter({room: may - {"", room} for room, may in MAY.items()}).prepare()


def test_there_is_no_circle() -> None:
    try:
        TopologicalSorter({module: set(names) - {NAME} for module, names in imports().items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("room", ["attn", "errors", "grouping", "moved"])
def test_attention_knows_nothing_of_transformers(room: str) -> None:
    """Nor does anything of ours that it imports."""
    reached = {module for module in sources() if room_of(module) == room}
    while more := {name for module in reached for name in imports()[module]} - reached - {NAME}:
        reached |= more
    for module in reached:
        for node in ast.walk(ast.parse(sources()[module].read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] == "transformers"], module


def test_a_folder_is_named_from_inside_or_in_full() -> None:
    """Relative imports go down from where they stand, never up."""
    for module, path in sources().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), module
