"""transformers' own model tests with sdpa and with ours: what is green with sdpa must be green with ours.

    make stock-suite                          # of the installed transformers
    python tests/stock_suite/run.py FOLDER    # FOLDER: an unpacked source distribution of the installed transformers

Prints the counts, and each test that passes with sdpa and fails with ours; exit status 1 if there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import transformers

#: nothing of this repository's settings and fixtures
PLAIN = [
    "-q", "--no-header", "--tb=line", "--noconftest", "--import-mode=importlib",
    "-p", "no:cacheprovider", "-c", os.devnull,
]  # fmt: skip


def outcomes(source: Path, implementation: str, arguments: list[str]) -> dict[str, tuple[str, str]]:
    """Of each test, by name: ("passed" | "failed" | "skipped", the message)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(Path(__file__).with_name("suite.py")),
            *PLAIN,
            "--rootdir",
            folder,
        ]
        command += [f"--junitxml={report}", *arguments]
        environment = {
            **os.environ,
            "HF_ATTN_STOCK_TESTS": str(source),
            "HF_ATTN_STOCK_WITH": implementation,
            "HF_HUB_OFFLINE": "1",
        }
        run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        if not report.exists():
            raise SystemExit(f"the tests did not start:\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
            kind = "passed" if not bad else "skipped" if bad[0].tag == "skipped" else "failed"
            found[f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = (
                kind, bad[0].get("message", "") if bad else "")  # fmt: skip
        return found


def main() -> None:
    source = Path(sys.argv[1]).resolve()
    if f"\nVersion: {transformers.__version__}\n" not in (source / "PKG-INFO").read_text(encoding="utf-8"):
        raise SystemExit(f"{source} is not the source distribution of transformers {transformers.__version__}")
    stock, ours = (outcomes(source, name, sys.argv[2:]) for name in ("sdpa", "ours"))
    print(f"transformers {transformers.__version__}, tests that its source distribution carries")
    for name, found in (("sdpa", stock), ("ours", ours)):
        kinds = [kind for kind, _ in found.values()]
        print(
            f"{name}: {kinds.count('passed')} passed, {kinds.count('failed')} failed, {kinds.count('skipped')} skipped"
        )
    worse = [name for name, (kind, _) in stock.items() if kind == "passed" and ours[name][0] != "passed"]
    better = [name for name, (kind, _) in stock.items() if kind == "failed" and ours[name][0] == "passed"]
    for name in worse:
        print(f"green with sdpa, {ours[name][0]} with ours: {name}: {ours[name][1][:200]}")
    for name in better:
        print(f"red with sdpa, green with ours: {name}: {stock[name][1][:120]}")
    raise SystemExit(1 if worse else 0)


if __name__ == "__main__":
    main()
