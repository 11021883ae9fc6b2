"""docs/families-tested.md, made from a test run.

    make families-tested                       # runs the tests of this folder, and writes the page
    python tests/modeling/family_table.py *.xml > docs/families-tested.md   # from runs with --junitxml=report.xml
    python tests/modeling/family_table.py --readme                          # the page's table into the README

A cell says "yes" if every test of that family and column passed, "NO" if one failed, "-" where there is none.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
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


def main() -> None:
    if sys.argv[1:] == ["--readme"]:
        into_readme()
        return
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(name) for name in sys.argv[1:]] or [Path(folder) / "report.xml"]
        if len(sys.argv) == 1:
            command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", f"--junitxml={reports[0]}"]
            subprocess.run(command, stdout=sys.stderr, check=False)
        cells: dict[tuple[str, str], set[str]] = {}
        families: dict[str, None] = {}
        for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
            name, _, parameters = case.get("name", "").partition("[")
            for column, prefixes in COLUMNS.items():
                if not parameters or not name.startswith(prefixes):
                    continue
                family = re.split(r"[-\]]", parameters.rstrip("]"))[-1]
                families[family] = None
                failed = case.find("failure") is not None or case.find("error") is not None
                skipped = case.find("skipped") is not None
                cells.setdefault((family, column), set()).add("NO" if failed else "-" if skipped else "yes")
    rows = []
    for family in families:
        found = [cells.get((family, column), {"-"}) for column in COLUMNS]
        row = ["NO" if "NO" in cell else "yes" if "yes" in cell else "-" for cell in found]
        rows.append(f"| {family} | {' | '.join(row)} |")
    version = ".".join(importlib.metadata.version("transformers").split(".")[:2])
    rules = "|---" * len(COLUMNS)
    print(PAGE.format(version=version, header=" | ".join(COLUMNS), rules=rules, rows="\n".join(rows)))


if __name__ == "__main__":
    main()
