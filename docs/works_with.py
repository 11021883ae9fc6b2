"""Write docs/works-with.md: runs the tests that are its rows. `python docs/works_with.py`."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ("tests/ecosystem", "tests/families/test_continuous_batching.py")
#: row's package -> the distribution whose version was tried; None: rules of another engine, written as a test
DISTRIBUTIONS: dict[str, str | None] = {"vLLM": None, "llama.cpp": "gguf"}

HEAD = """# Works with

Each row is a test on the CPU (`tests/ecosystem/`, and for continuous batching
`tests/families/test_continuous_batching.py`): results are compared with eager attention, or with the arithmetic
that the other tool does. `python docs/works_with.py` runs them and writes this page.

| Tool | Tried with | What | The line to write |
|---|---|---|---|
"""

TAIL = """
Not here: models that bitsandbytes quantizes, which `enable` switches like others; their checkpoints are refused by
`hf-attn convert` with the same sentence as torchao's. vLLM's rows are its loaders' rules written as a test, not a run
of vLLM; so are llama.cpp's, and its own converter (of llama-cpp-python 0.3.36) wrote what they expect for a converted
Llama.
"""


class Recorder:
    """What became of each row: its tests' outcomes."""

    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}
        self.outcomes: dict[Any, set[str]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.rows = {i.nodeid: i.function.works_with for i in items if hasattr(i.function, "works_with")}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.nodeid in self.rows and (report.when == "call" or report.outcome != "passed"):
            self.outcomes.setdefault(self.rows[report.nodeid], set()).add(report.outcome)


def version(package: str) -> str:
    distribution = DISTRIBUTIONS.get(package, package)
    return "rules" if distribution is None else f"{distribution} {importlib.metadata.version(distribution)}"


def main() -> int:
    recorder = Recorder()
    options = ["--rootdir", str(ROOT), "--ignore", str(ROOT / "tests/ecosystem/test_table.py")]  # it checks the page
    code = pytest.main([*(str(ROOT / t) for t in TESTS), *options], plugins=[recorder])
    bad = [row for row, outcomes in recorder.outcomes.items() if outcomes != {"passed"}]
    for row in bad:
        print(f"not passed: {row.package}: {row.what} ({', '.join(sorted(recorder.outcomes[row]))})", file=sys.stderr)
    if code or bad:
        return 1
    rows = sorted(recorder.outcomes, key=lambda row: (row.package.lower(), row.what))
    lines = [f"| {row.package} | {version(row.package)} | {row.what} | `{row.line}` |\n" for row in rows]
    (ROOT / "docs/works-with.md").write_text(HEAD + "".join(lines) + TAIL, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
