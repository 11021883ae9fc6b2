"""Whether engines say of converted checkpoints what transformers says.

    make engines                                                       # environments, all engines, the table
    python benchmarks/engines/run.py --engine llama.cpp --families llama qwen2

Every family is made tiny, converted to two of its eight KV heads, and asked: greedy tokens must be the same, log
probabilities within the tolerance of the format (``ENGINES``), ten times closer than exchanged KV heads would be. Rows
are kept in ``benchmarks/results/engines.json`` as soon as they are there. An engine that fails, or that takes what it
is said not to take, fails the command with a sentence.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[2])

from benchmarks.engines import cases
from benchmarks.engines.compare import Row, fault, read_steps, table

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
RESULTS = ROOT / "benchmarks/results"
#: the first five are what people serve most; they are asked over vLLM's server too
SERVED = ("llama", "qwen2", "qwen3", "mixtral", "gemma")


class Engine(NamedTuple):
    """Where it lives, what it is asked, and how near its answers must be."""

    worker: str
    environment: str
    families: tuple[str, ...]
    #: way of asking -> tolerance of a log probability
    ways: dict[str, float]
    #: family -> part of the message with which the engine refuses it, and the sentence for the table
    refuses: Mapping[str, tuple[str, str]] = MappingProxyType({})


_OWN_CALL = (
    "does not dispatch through the Transformers attention interface",
    "it looks for the call of transformers' attention interface in the layer's own code, and there it is in a function "
    "that these families share; nor do their blocks, in the transformers that it takes (older than 5.20), hand on the "
    "keywords by which it would reach it",
)
_NO_POSITIONS = (
    "Argument position_ids not found",
    "it hands models `position_ids`, which models with ALiBi do not take",
)
ENGINES = {
    "vLLM": Engine("vllm_worker.py", ".venv-engines-vllm", tuple(cases.STOCK), {"offline": 1e-3, "server": 1e-3}),
    "vLLM-transformers": Engine(
        "vllm_worker.py", ".venv-engines-vllm", tuple(cases.GROUPED), {"offline": 1e-3},
        {"gpt2": ("Following weights were not initialized", "it does not load the bias of `c_attn`")}
        | dict.fromkeys(("gptj", "codegen", "gpt_neo"), _OWN_CALL)
        | dict.fromkeys(("bloom", "mpt"), _NO_POSITIONS),
    ),
    "llama.cpp": Engine(
        "llama_cpp_worker.py", ".venv-engines-llama", tuple(f for f in cases.STOCK if f != "glm4"),
        {"f16": 0.05, "q8_0": 0.5},
    ),
    "CTranslate2": Engine(
        "ctranslate2_worker.py", ".venv-engines-ctranslate2", ("mistral", "qwen2", "qwen3", "gemma"), {"float32": 1e-3}
    ),
    "ONNX Runtime": Engine(
        "onnxruntime_worker.py", ".venv-engines-onnxruntime", ("llama", "qwen2", "qwen3", "gemma"), {"exported": 1e-3}
    ),
}  # fmt: skip


class EngineError(Exception):
    """What an engine said instead of an answer."""


def run(command: list[str], log: Path, seconds: float = 7200) -> None:
    """A process with none of our settings; its output goes to a file.

    Raises:
        EngineError: it ended otherwise than well; the end of its output.
    """
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    with log.open("wb") as out:
        try:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            raise EngineError(f"no answer within {seconds:.0f} s") from None
    if code:
        raise EngineError(log.read_text(errors="replace")[-20_000:].strip() or f"ended with {code}")


def last_line(message: str) -> str:
    """What a traceback ends with: its last line that names an error, or the last at all."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return [*(named[-1:] or lines[-1:]), "it said nothing"][0][:300]


class Question(NamedTuple):
    """One family asked in one way, and the right answer."""

    engine: str
    family: str
    way: str
    folder: Path
    want: cases.Expected

    def job(self, work: Path) -> dict[str, Any]:
        """What the worker is told."""
        own = self.engine == "vLLM-transformers"
        return {
            "folder": str(self.folder), "way": self.way, "prompts": self.want.prompts, "steps": cases.NEW_TOKENS,
            "top": 4 * cases.TOP, "implementation": "transformers" if own else "auto", "own_code": own,
            "gguf": str(work / f"{self.family}.{self.way}.gguf"),
        }  # fmt: skip

    def row(self, answer: dict[str, Any]) -> Row:
        """The verdict on a worker's line: ``tokens`` and ``logprobs``, or ``error``."""
        engine = ENGINES[self.engine]
        part, sentence = engine.refuses.get(self.family, ("", ""))
        head = (self.engine, self.family, self.way, answer.get("version", self.engine), str(datetime.date.today()))
        size = sum(map(len, self.want.tokens))
        if "error" in answer:
            known = bool(part) and part in answer["error"]
            wrong = "" if known else last_line(answer["error"])
            return Row(*head, float("nan"), self.want.exchanged, size, wrong, sentence * known)
        said = answer | {"logprobs": read_steps(answer["logprobs"])}
        apart, wrong = fault(self.want._asdict(), said, engine.ways[self.way])
        if part:
            wrong = f"it runs, although it is said that it does not: {sentence}"
        return Row(*head, apart, self.want.exchanged, size, wrong)


def to_gguf(jobs: list[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """The jobs after llama.cpp's converter, which ``make engines`` has laid beside its environment, was at work."""
    converter = ROOT / ENGINES["llama.cpp"].environment / "llama.cpp"
    (work / "gguf").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    try:
        run([sys.executable, str(HERE / "gguf_convert.py"), str(converter), str(work / "gguf")], work / "log")
    except EngineError as error:
        raise SystemExit(f"llama.cpp's converter: {last_line(str(error))}") from None
    return [json.loads(line) for line in (work / "gguf").read_text().splitlines()]


def asked(name: str, questions: list[Question], work: Path) -> Iterator[Row]:
    """One worker for all questions; where it dies, the next one goes on behind the question that killed it."""
    jobs = [(question, question.job(work)) for question in questions]
    if name == "llama.cpp":
        told = to_gguf([job for _, job in jobs], work)
        for question, job in zip(questions, told, strict=True):
            if "error" in job:
                yield question.row(job)
        jobs = [(question, job) for question, job in zip(questions, told, strict=True) if "error" not in job]
    python = ROOT / ENGINES[name].environment / "bin/python"
    if not python.exists():
        raise SystemExit(f"{ENGINES[name].environment} is not there: make engines makes it")
    while jobs:
        (work / "jobs").write_text("".join(json.dumps(job) + "\n" for _, job in jobs))
        (work / "answers").write_text("")
        died = ""
        try:
            run(
                [str(python), str(HERE / ENGINES[name].worker), str(work / "jobs"), str(work / "answers")], work / "log"
            )
        except EngineError as failed:
            died = str(failed)
        answers = [json.loads(line) for line in (work / "answers").read_text().splitlines()]
        if len(answers) < len(jobs):
            answers.append({"error": died or "it ended without an answer"})
        for (question, _), answer in zip(jobs, answers, strict=False):
            yield question.row(answer)
        jobs = jobs[len(answers) :]


class Made:
    """Converted checkpoints and the right answers, each made once."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.text = folder, text
        self.checkpoints: dict[str, Path] = {}
        self.answers: dict[tuple[str, bool], cases.Expected] = {}

    def __call__(self, family: str, q8_0: bool) -> tuple[Path, cases.Expected]:
        if family not in self.checkpoints:
            (self.folder / family).mkdir(parents=True)
            self.checkpoints[family] = cases.make(family, self.folder / family, self.text)
        if (family, q8_0) not in self.answers:
            self.answers[family, q8_0] = cases.expected(self.checkpoints[family], q8_0)
        return self.checkpoints[family], self.answers[family, q8_0]


def questions_of(name: str, families: list[str] | None, ways: list[str] | None, made: Made) -> list[Question]:
    return [
        Question(name, family, way, *made(family, way == "q8_0"))
        for way in ENGINES[name].ways
        for family in ENGINES[name].families
        if (not families or family in families) and (not ways or way in ways) and (way != "server" or family in SERVED)
    ]


def merged(old: list[dict[str, Any]], new: list[Row]) -> list[dict[str, Any]]:
    """Rows by engine, family and way, the new ones in the place of the old."""
    rows = {(r["engine"], r["family"], r["way"]): r for r in [*old, *(row._asdict() for row in new)]}
    order = {name: i for i, name in enumerate(ENGINES)}
    return sorted(rows.values(), key=lambda r: (order.get(r["engine"], 99), r["family"], r["way"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=[*ENGINES], help="one of them; again for more")
    parser.add_argument("--families", nargs="+", help="some families only")
    parser.add_argument("--ways", nargs="+", help="some ways of asking only, such as offline or q8_0")
    parser.add_argument("--out", type=Path, default=RESULTS / "engines.json")
    return parser.parse_args()


def main() -> int:
    from tiny import python_sources  # of tests/helpers, which importing benchmarks has made known

    options = parse()
    names = options.engine or [*ENGINES]
    unknown = {*(options.families or ())} - {f for name in names for f in ENGINES[name].families}
    if unknown:
        raise SystemExit(f"no engine is asked about {', '.join(sorted(unknown))}")
    text = "\n".join(path.read_text(encoding="utf-8") for path in python_sources())
    all_rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        made = Made(Path(temporary) / "models", text)
        for name in names:
            work = Path(temporary) / "work"
            work.mkdir(exist_ok=True)
            for row in asked(name, questions_of(name, options.families, options.ways, made), work):
                all_rows.append(row)
                print(f"{row.version}: {row.family}, {row.way}: {row.fault or row.refused or 'the same'}", flush=True)
                old = json.loads(options.out.read_text()) if options.out.exists() else []
                options.out.write_text(json.dumps(merged(old, [row]), indent=1) + "\n")
    print("\n" + table(all_rows))
    wrong = [row for row in all_rows if row.fault]
    for row in wrong:
        print(f"{row.version}, {row.family}, {row.way}: {row.fault}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
