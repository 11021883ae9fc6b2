"""What a conversion keeps and what uptraining gives back, by method, on a language model trained here.

    python benchmarks/quality.py --out results                      # a GPU; minutes
    python benchmarks/quality.py --small --out results              # a CPU; minutes

Trains a multi-head Llama on the Python source installed on the machine, converts it by every method to fewer KV heads,
and reports the held-out loss right after conversion and after uptraining with a share of the pretraining tokens, each
share with a schedule of its own. Every number is written to ``quality.json`` as soon as it is there; the table and the
figure come from that file (``--report`` makes them again).

Calibration text is the beginning of the uptraining text: a model uptrained with 1% has seen 1% of the tokens in all.

A method or a recipe may be varied by fields of its own: ``--methods calibrated+refit:epochs=16``,
``--recipes plain:lr=2e-4:hidden=1``. Of several recipes the best of the first seed, for each method, loss and share,
is run with the other seeds too, and is what the table and the figure show. ``--workers`` processes share the GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_attn_patch.compat.python import stop_workers

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch

from benchmarks.code_lm import FULL, SMALL, Size, corpus
from benchmarks.quality_methods import METHODS, RECIPES, varied
from benchmarks.quality_report import best_recipe, report
from benchmarks.quality_worker import Inline, begin, do, weights_file


class Work:
    """Everything asked for: base models, then conversions, then uptraining; what is done is written at once.

    What ``quality.json`` has already is not done again, so that several runs add up in one folder.
    """

    def __init__(self, options: argparse.Namespace, size: Size) -> None:
        self.options, self.size, self.begun = options, size, time.time()
        file = options.out / "quality.json"
        self.records: list[dict[str, Any]] = json.loads(file.read_text())["records"] if file.exists() else []
        self.pending: list[Future[dict[str, Any]]] = []
        self.asked: set[tuple[Any, ...]] = set()

    def run(self) -> None:
        options = self.options
        how = (self.size, options.cache, options.device, options.compile)
        corpus(self.size, options.cache)  # once, before the workers read it
        if options.workers:
            context = multiprocessing.get_context("spawn")
            self.pool: Any = ProcessPoolExecutor(options.workers, context, initializer=begin, initargs=how)
        else:
            begin(*how)
            self.pool = Inline()
        for seed in options.seeds:
            self.submit("base", seed)
        while self.pending and time.time() - self.begun < options.seconds:
            wait(self.pending, timeout=1.0, return_when=FIRST_COMPLETED)
            done = [f for f in self.pending if f.done()]
            self.pending = [f for f in self.pending if not f.done()]
            for future in done:
                record = future.result()
                print(f"{time.time() - self.begun:5.0f} s", describe(record), flush=True)
                self.records.append(record)
                write(options.out, self.size, self.records)
                self.follow(record)
        if options.workers:
            if self.pending:
                stop_workers(self.pool)
            self.pool.shutdown(wait=not self.pending, cancel_futures=True)

    def submit(self, kind: str, *args: Any) -> None:
        """Hand out a piece of work, unless its result is known and its weights are there."""
        names = {
            "base": ("seed",),
            "convert": ("seed", "kv_heads", "method"),
            "uptrain": ("seed", "kv_heads", "method", "share", "distil", "recipe"),
        }[kind]
        wanted = {"kind": {"base": "base", "convert": "untrained", "uptrain": "uptrained"}[kind]}
        wanted.update(zip(names, args, strict=True))
        if (kind, *args) in self.asked:
            return
        self.asked.add((kind, *args))
        known = next((r for r in self.records if all(r.get(k) == v for k, v in wanted.items())), None)
        file = weights_file(self.options.cache, self.size, "base" if kind == "base" else "student", *args)
        if known is not None and (kind == "uptrain" or file.exists()):
            self.follow(known)
            return
        self.records = [r for r in self.records if r is not known]
        self.pending.append(self.pool.submit(do, kind, *args))

    def follow(self, record: dict[str, Any]) -> None:
        """Submit what can start once ``record`` is there."""
        options, seed = self.options, record["seed"]
        if record["kind"] == "base":
            for method in options.methods:
                for n in options.kv_heads:
                    self.submit("convert", seed, n, method)
            if options.control:
                for share in options.shares:
                    for recipe in self.recipes(seed, "none", share, False):
                        self.submit("uptrain", seed, self.size.heads, "none", share, False, recipe)
        elif record["kind"] == "untrained":
            self.uptrain(record)
        elif seed == options.seeds[0]:  # perhaps the last of the recipes: the other seeds wait for that
            for other in list(self.records):
                if other["kind"] == "untrained" or (other["kind"] == "base" and options.control):
                    self.follow(other)

    def uptrain(self, record: dict[str, Any]) -> None:
        options, seed, method = self.options, record["seed"], record["method"]
        asked = seed in options.seeds and method in (options.uptrain or options.methods)
        if not asked or record["kv_heads"] not in options.kv_heads:  # the folder also holds what others asked for
            return
        for share in options.shares:
            for loss in options.losses:
                for recipe in self.recipes(seed, method, share, loss == "kd"):
                    self.submit("uptrain", seed, record["kv_heads"], method, share, loss == "kd", recipe)

    def recipes(self, seed: int, method: str, share: float, distil: bool) -> list[str]:
        """All of them for the first seed, and what is best there for the others (nothing before that is known)."""
        options = self.options
        if seed == options.seeds[0] or len(options.recipes) == 1:
            return list(options.recipes)
        heads = [self.size.heads] if method == "none" else options.kv_heads
        wanted = {"kind": "uptrained", "seed": options.seeds[0], "method": method, "share": share, "distil": distil}
        found = [r for r in self.records if all(r.get(k) == v for k, v in wanted.items())]
        done = {(r["kv_heads"], r["recipe"]) for r in found}
        if any((n, recipe) not in done for n in heads for recipe in options.recipes):
            return []
        return [best_recipe(found)]


def describe(record: dict[str, Any]) -> str:
    parts = [record["kind"], f"seed {record['seed']}"]
    if "method" in record:
        parts.append(f"-> {record['kv_heads']} {record['method']}")
    if "share" in record:
        parts.append(f"{record['share']:.0%} {'KD' if record['distil'] else 'CE'} {record['recipe']}")
    return f"{' '.join(parts)}: {record['loss']:.4f} ({record['seconds']} s)"


def write(out: Path, size: Size, records: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    about = {"size": asdict(size), "torch": torch.__version__, "recipes": {k: asdict(v) for k, v in RECIPES.items()}}
    if torch.cuda.is_available():
        about["device"] = torch.cuda.get_device_name()
    temporary = out / "quality.json.part"
    temporary.write_text(json.dumps({"about": about, "records": records}, indent=1))
    temporary.replace(out / "quality.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: [] if text == "none" else text.split(",")  # noqa: E731
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--small", action="store_true", help="a model and a budget for a CPU")
    parser.add_argument("--out", type=Path, default=Path("quality-results"))
    parser.add_argument("--cache", type=Path, default=Path("quality-cache"), help="corpus and weights, kept")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--kv-heads", type=numbers, default=[4, 2, 1])
    parser.add_argument("--methods", type=words, default=list(METHODS))
    parser.add_argument("--uptrain", type=words, default=[], help="the methods to uptrain (default: all)")
    parser.add_argument("--shares", type=lambda t: [float(x) for x in words(t)], default=[0.01, 0.05])
    parser.add_argument("--losses", type=words, default=["ce", "kd"])
    parser.add_argument("--recipes", type=words, default=["plain"])
    parser.add_argument("--control", action="store_true", help="also train the multi-head model on as many more tokens")
    parser.add_argument("--tokens", type=int, help="pretraining tokens, if not the size's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that share the device (0: this one)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long, with what is there")
    parser.add_argument("--report", action="store_true", help="only the table and the figure, from quality.json")
    options = parser.parse_args()
    size = SMALL if options.small else FULL
    if options.tokens:
        size = replace(size, tokens=options.tokens)
    for name, known in (("methods", METHODS), ("uptrain", METHODS), ("recipes", RECIPES)):
        for given in getattr(options, name):
            if given.split(":")[0] not in known:
                parser.error(f"--{name}: {given!r} is none of {', '.join(known)}")
            varied(given, known)
    if not options.report:
        Work(options, size).run()
    report(options.out)


if __name__ == "__main__":
    main()
