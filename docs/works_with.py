"""Write docs/works-with.md: runs the tests that are its rows. `python docs/works_with.py`.

With ``--engines`` only the rows of what `make engines` found are written anew.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ("tests/ecosystem", "tests/families/test_continuous_batching.py")
#: written by `make engines`, which runs them in environments of their own
ENGINES = ROOT / "benchmarks/results/engines.json"
#: engine, asked -> what was done, and the line that a user writes
ASKED = {
    ("vLLM", "offline"): ("`LLM.generate`, fp32", "LLM(model=folder)"),
    ("vLLM", "server"): ("its OpenAI server, fp32", "python -m vllm.entrypoints.openai.api_server --model FOLDER"),
    ("vLLM-transformers", "offline"): (
        "its transformers backend: families of this package, converted `--with-code`",
        "LLM(model=folder, model_impl='transformers', trust_remote_code=True)",
    ),
    ("llama.cpp", "f16"): ("its converter, f16", "convert_hf_to_gguf.py FOLDER --outtype f16"),
    ("llama.cpp", "q8_0"): ("its converter, q8_0", "convert_hf_to_gguf.py FOLDER --outtype q8_0"),
    ("ONNX Runtime", "exported"): ("`torch.onnx.export`, fp32, no cache", "torch.onnx.export(model, ..., dynamo=True)"),
    ("CTranslate2", "float32"): ("its converter, float32", "ct2-transformers-converter --model FOLDER"),
}
#: packages whose rules are written as a test, without the engine -> the distribution that has some of the rules
RULES: dict[str, str | None] = {"vLLM": None, "llama.cpp": "gguf"}

HEAD = """# Works with

*Run*: the tool itself ran, in these versions, on that day, on a CPU. *Rules*: what it reads of a checkpoint is written
as a test, and it did not run. Rows are tests (`tests/ecosystem/`, and for continuous batching
`tests/families/test_continuous_batching.py`), compared with eager attention or with the arithmetic that the other tool
does; engines are run by `make engines` in environments of their own, on a tiny model of each family with 2 of its 8 KV
heads: [the same greedy tokens, and how near the log probabilities are](serving.md#what-was-compared).
`python docs/works_with.py` runs the tests and writes this page.

| Tool | Tried with | What | The line to write |
|---|---|---|---|
"""

TAIL = """
On H100s, `pytest -m gpu2` (2026-11-27, torch 2.11, transformers 5.17 and 5.24, accelerate 1.15, NCCL):

- tensor parallelism (`tp_plan="auto"`) with a growing cache and recorded steps, on transformers 5.24: the tokens of one
  GPU, greedy, sampled and with beams. Steps are recorded with their collectives and get the same few kernels as on one
  GPU, so that more GPUs also make them faster. Tokens a second, a quarter of Llama-3-8B, prompts of 512
  (`benchmarks/tensor_parallel.py`, results/tensor_parallel.json; for one row two runs on two GPUs differed that much):

  | H100s | 1 row: sdpa | `enable(model)` | 16 rows: sdpa | `enable(model)` |
  |---|---|---|---|---|
  | one | 79 | 604 | 1,675 | 9,232 |
  | two | 49, 44 | 430, 712 | 630, 668 | 11,000, 10,948 |
  | four | 45 | 895 | 765 | 11,689 |

  transformers 5.17, one row on two: 53 and 751
- [calibration by two processes](convert.md): the weights of one but for 0.7 % of what was learned (fitted), 0.2 %
  (polished)
- [FSDP2 with context parallelism](run.md#texts-too-long-for-one-gpu): the step that every packed document by itself
  asks for (once more on two H200s, with the refusals of what cannot be split)

Not here: models that bitsandbytes quantizes, which `enable` switches like others; their checkpoints are refused by
`hf-attn convert` with the same sentence as torchao's.
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


def tried(package: str) -> str:
    """Run or rules, and the version."""
    if package in RULES:
        distribution = RULES[package]
        return "rules" if distribution is None else f"rules, {distribution} {importlib.metadata.version(distribution)}"
    return f"run, {package} {importlib.metadata.version(package)}, {datetime.date.today()}"


def engine_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each engine and way of asking; a family that is not the same or not taken has its own."""
    lines = []
    for key in dict.fromkeys((r["engine"], r["way"]) for r in rows):
        mine = [r for r in rows if (r["engine"], r["way"]) == key]
        what, line = ASKED[key]
        good = [r for r in mine if not r["fault"] and not r["refused"]]
        for version, date in dict.fromkeys((r["version"], r["date"]) for r in good):
            same = ", ".join(r["family"] for r in good if (r["version"], r["date"]) == (version, date))
            lines.append(f"| {key[0].split('-')[0]} | run, {version}, {date} | {what}: {same} | `{line}` |\n")
        for said, version, date in dict.fromkeys(
            (r["fault"] or r["refused"], r["version"], r["date"]) for r in mine if r not in good
        ):
            other = ", ".join(r["family"] for r in mine if (r["fault"] or r["refused"]) == said)
            lines.append(f"| {key[0].split('-')[0]} | run, {version}, {date} | {what}: not {other}: {said} | |\n")
    return lines


PAGE = ROOT / "docs/works-with.md"


def write(rows: list[str]) -> int:
    """The page, with the engines' lines among those of the tests."""
    lines = rows + engine_lines(json.loads(ENGINES.read_text(encoding="utf-8")))
    lines.sort(key=lambda line: line.split(" | ")[0].lower())
    PAGE.write_text(HEAD + "".join(lines) + TAIL, encoding="utf-8")
    return 0


def rows_of_tests() -> list[str]:
    """The lines of the page as it is, without the engines'."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines(keepends=True) if line.startswith("| ")]
    engines = {engine.split("-")[0] for engine, _ in ASKED}
    tests = [line for line in lines if not (line.split(" | ")[0][2:] in engines and " | run, " in line)]
    return [line for line in tests if not line.startswith("| Tool |")]


def main() -> int:
    if "--engines" in sys.argv[1:]:
        return write(rows_of_tests())
    recorder = Recorder()
    options = ["--rootdir", str(ROOT), "--ignore", str(ROOT / "tests/ecosystem/test_table.py")]  # it checks the page
    code = pytest.main([*(str(ROOT / t) for t in TESTS), *options], plugins=[recorder])
    bad = [row for row, outcomes in recorder.outcomes.items() if outcomes != {"passed"}]
    for row in bad:
        print(f"not passed: {row.package}: {row.what} ({', '.join(sorted(recorder.outcomes[row]))})", file=sys.stderr)
    if code or bad:
        return 1
    rows = sorted(recorder.outcomes, key=lambda row: (row.package.lower(), row.what))
    lines = [f"| {row.package} | {tried(row.package)} | {row.what} | `{row.line}` |\n" for row in rows]
    return write(lines)


if __name__ == "__main__":
    sys.exit(main())
