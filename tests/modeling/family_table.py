"""docs/families-tested.md, made from a test run.

    make families-tested                       # runs the tests that the columns name, and writes the page
    python tests/modeling/family_table.py *.xml > docs/families-tested.md   # from runs with --junitxml=report.xml
    python tests/modeling/family_table.py --readme                          # the page's table into the README

A cell says "yes" if every test of that family and column passed, "NO" if one failed, "-" where there is none. The
families are those of tests/helpers/zoo_cases.py: parameters of other tests are no rows.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

FOLDER = Path(__file__).parent
PAGE = """# Families with configurable KV heads

Made by `make families-tested` from a run of the tests (transformers {version}, CPU). "-": nothing to test (an encoder
does not generate; Falcon converts to transformers' own Falcon, which needs no code of ours).

| family | {header} |
|---{rules}|
{rows}"""
COLUMNS = {
    "stock logits at full heads": ("test_full_heads_are_the_stock_model",),
    "loads by Auto class": ("test_save_and_reload_through_auto_classes",),
    "loads without us": ("test_loads_without_this_package",),
    "converts": ("test_mean_is_the_mean", "test_a_grouped_checkpoint"),
    "generates": ("test_generate_and_what_it_caches", "test_beam_search", "test_cached_tokens_are"),
    "trains": ("test_gradients_are", "test_gradient_checkpointing"),
    "compiles": ("test_compiles",),
}


def table_of(text: str) -> str:
    """The table about families in a page."""
    return text[text.index("| family |") :].partition("\n\n")[0].strip()


def into_readme() -> None:
    """Put the page's table where the README has one."""
    root = FOLDER.parents[1]
    readme, page = root / "README.md", root / "docs" / "families-tested.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.replace(table_of(text), table_of(page.read_text(encoding="utf-8"))), encoding="utf-8")


def family_names() -> list[str]:
    """The families in the table's order."""
    with contextlib.redirect_stdout(sys.stderr):  # the page goes to stdout
        sys.path.insert(0, str(FOLDER.parent / "helpers"))
        import zoo_cases
    return [case.stock for case in zoo_cases.CASES]


def cells_of(reports: Iterable[Path], families: list[str]) -> dict[tuple[str, str], set[str]]:
    """(family, column) -> what its tests came to: "yes", "NO", "-"."""
    cells: dict[tuple[str, str], set[str]] = {}
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        name, _, parameters = case.get("name", "").partition("[")
        family = parameters.rstrip("]").rpartition("-")[2]
        if family not in families:
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped") is not None
        for column, prefixes in COLUMNS.items():
            if name.startswith(prefixes):
                cells.setdefault((family, column), set()).add("NO" if failed else "-" if skipped else "yes")
    return cells


def page_of(reports: Iterable[Path]) -> str:
    """The page that reports of a run make."""
    families = family_names()
    cells = cells_of(reports, families)
    rows = []
    for family in families:
        found = [cells.get((family, column), {"-"}) for column in COLUMNS]
        row = ["NO" if "NO" in cell else "yes" if "yes" in cell else "-" for cell in found]
        rows.append(f"| {family} | {' | '.join(row)} |")
    version = ".".join(importlib.metadata.version("transformers").split(".")[:2])
    rules = "|---" * len(COLUMNS)
    return PAGE.format(version=version, header=" | ".join(COLUMNS), rules=rules, rows="\n".join(rows))


def main() -> None:
    if sys.argv[1:] == ["--readme"]:
        into_readme()
        return
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(name) for name in sys.argv[1:]] or [Path(folder) / "report.xml"]
        if len(sys.argv) == 1:
            named = " or ".join(prefix for prefixes in COLUMNS.values() for prefix in prefixes)
            command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-k", named, f"--junitxml={reports[0]}"]
            subprocess.run(command, stdout=sys.stderr, check=False)
        print(page_of(reports))


if __name__ == "__main__":
    main()
