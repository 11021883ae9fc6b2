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
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from hf_attn_patch.conversion.align import merge_aligned
from hf_attn_patch.conversion.aligned import permuted
from hf_attn_patch.conversion.families import Stack
from hf_attn_patch.conversion.group import pair_losses, similar_order
from hf_attn_patch.conversion.heads import LayerAttention, stack_layers
from hf_attn_patch.conversion.layouts import AttentionWeights
from hf_attn_patch.conversion.pool import first_of, mean_of
from hf_attn_patch.conversion.refit import RefitRecipe, refit
from transformers import LlamaForCausalLM

from benchmarks.code_lm import FULL, SMALL, Corpus, Recipe, Size, autocast, corpus, forward, held_out_loss, train
from benchmarks.quality_report import best_recipe, report

DATA_SEED = 1000  # of the uptraining text; the base model's is its own seed


@dataclass(frozen=True)
class Conversion:
    """A conversion by name: how heads are merged, on what text, and what is fitted after."""

    merge: str  # mean | first | random | aligned
    calibrated: bool = False
    refit: RefitRecipe | None = None
    tokens: int = 500_000  # calibration text; at most 1% of the pretraining tokens
    similar: bool = False  # heads grouped by what they lose together


METHODS = {
    "random": Conversion("random"),
    "first": Conversion("first"),
    "mean": Conversion("mean"),
    "aligned": Conversion("aligned"),
    "calibrated": Conversion("aligned", True),
    "similar": Conversion("aligned", True, similar=True),
    "mean+refit": Conversion("mean", False, RefitRecipe()),
    "calibrated+refit": Conversion("aligned", True, RefitRecipe()),
}

#: how models are uptrained: tokens and the loss are filled in
RECIPES = {
    "plain": Recipe(0, 16_384, 5e-4, warmup=0.1),
}


def varied(text: str, known: dict[str, Any]) -> Any:
    """``NAME:field=value:...``: an entry of ``known`` with fields of its own, or of its refit, changed."""
    name, *changes = text.split(":")
    found = known[name]
    for change in changes:
        key, value = change.split("=")
        refitted = getattr(found, "refit", None)
        owner = found if hasattr(found, key) else refitted
        old = getattr(owner, key)
        new = value == "True" if isinstance(old, bool) else type(old)(float(value) if isinstance(old, int) else value)
        found = (
            replace(found, **{key: new}) if owner is found else replace(found, refit=replace(refitted, **{key: new}))
        )
    return found


def heads_of(attention: torch.nn.Module, layer: LayerAttention) -> AttentionWeights:
    """The projections of a Llama attention module, head by head."""
    D = layer.head_dim
    q, k, v = (getattr(attention, n).weight.detach().unflatten(0, (-1, D)) for n in ("q_proj", "k_proj", "v_proj"))
    return AttentionWeights(
        layer, q=q, k=k, v=v, o=attention.o_proj.weight.detach().unflatten(1, (-1, D)).transpose(0, 1)
    )


@torch.no_grad()
def moments(model: LlamaForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    """E[x x^T] of what every layer's attention reads, x extended by 1; fp64 sums."""
    E = model.config.hidden_size
    sums = [torch.zeros(E + 1, E + 1, dtype=torch.float64, device=ids.device) for _ in model.model.layers]
    hooks = []
    for total, layer in zip(sums, model.model.layers, strict=True):

        def add(_m: Any, _args: Any, kwargs: dict[str, Any], total: torch.Tensor = total) -> None:
            x = kwargs["hidden_states"].flatten(0, -2).float()
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            total += (x.T @ x).double()

        hooks.append(layer.self_attn.register_forward_pre_hook(add, with_kwargs=True))
    for block in ids.split(16):
        with autocast(ids.device):
            model.model(input_ids=block, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [total / ids.numel() for total in sums]


def convert(model: LlamaForCausalLM, kv_heads: int, how: Conversion, ids: torch.Tensor, seed: int) -> LlamaForCausalLM:
    """A copy of ``model`` with ``kv_heads`` KV heads; ``ids`` [N, S] is the calibration text."""
    config = replace_config(model, kv_heads)
    student = LlamaForCausalLM(config).to(ids.device).eval()
    state = model.state_dict()
    student.load_state_dict({k: v for k, v in state.items() if ".k_proj" not in k and ".v_proj" not in k}, strict=False)
    known = moments(model, ids) if how.calibrated else [None] * len(model.model.layers)
    layers = [replace(x, new_kv_heads=kv_heads) for x in stack_layers(Stack(), model.config, "the base model")]
    generator = torch.Generator().manual_seed(seed)
    for new, old, layer, moment in zip(student.model.layers, model.model.layers, layers, known, strict=True):
        weights = heads_of(old.self_attn, layer)
        if how.similar:
            weights = permuted(weights, similar_order(pair_losses(weights, moment=moment), kv_heads))
        assert weights.k is not None
        assert weights.v is not None
        if how.merge == "aligned":
            weights = merge_aligned(weights, moment=moment)
        elif how.merge == "random":
            shape = (kv_heads, *weights.k.shape[1:])
            drawn = [torch.randn(shape, generator=generator).to(weights.k) * 0.02 for _ in range(2)]
            weights = replace(weights, k=drawn[0], v=drawn[1])
        else:
            pool = mean_of if how.merge == "mean" else first_of
            weights = replace(weights, k=pool(weights.k, layer.merged), v=pool(weights.v, layer.merged))
        with torch.no_grad():
            for name in "qkv":
                getattr(new.self_attn, f"{name}_proj").weight.copy_(getattr(weights, name).flatten(0, 1))
            new.self_attn.o_proj.weight.copy_(weights.o.transpose(0, 1).flatten(1))
    if how.refit:
        refit(
            model,
            student.model.layers,
            model.model.layers,
            ids,
            how.refit,
            trained=lambda layer: list(layer.self_attn.parameters()),
            autocast=lambda: autocast(ids.device),
            noise=1e-5 if ids.is_cuda else 1e-10,
        )
    return student


def replace_config(model: LlamaForCausalLM, kv_heads: int) -> Any:
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_key_value_heads = kv_heads
    return config


def weights_file(cache: Path, size: Size, *parts: object) -> Path:
    """Where a base model ("base", seed) or a converted one ("student", seed, KV heads, method) is kept."""
    name = "-".join(str(p) for p in (f"{size.hidden}x{size.layers}-{size.tokens}", *parts))
    return cache / (name.replace("+", "_").replace(":", "_") + ".pt")


class Bench:
    """One process's work: holds the corpus, trains, converts, uptrains. Weights are passed on as files."""

    def __init__(self, size: Size, cache: Path, device: str, compiled: bool) -> None:
        self.size, self.cache, self.device = size, cache, torch.device(device)
        self.compiled = compiled
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.recompile_limit = 64
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # in each of several workers
        torch._dynamo.config.automatic_dynamic_shapes = False  # few shapes, each worth a graph of its own
        if self.device.type == "cpu":
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.data: Corpus = corpus(size, cache, log=lambda text: print(text, flush=True)).to(self.device)

    def file(self, *parts: object) -> Path:
        return weights_file(self.cache, self.size, *parts)

    def load(self, file: Path, kv_heads: int | None = None) -> LlamaForCausalLM:
        config = self.size.config()
        config.num_key_value_heads = kv_heads or self.size.heads
        model = LlamaForCausalLM(config)
        model.load_state_dict(torch.load(file, map_location="cpu"))
        return model.to(self.device).eval()

    def compile(self, model: LlamaForCausalLM, batch_tokens: int) -> None:
        """Compile the layers (one graph serves all of them) if asked for and if this machine can."""
        if not self.compiled:
            return
        for layer in model.model.layers:
            layer.compile()
        rows = max(1, batch_tokens // self.size.seq)
        ids = self.data.train[: rows * self.size.seq].long().view(rows, -1)
        model.train()
        try:
            with autocast(self.device):
                forward(model, ids)[0].float().mean().backward()
        except Exception as error:  # the compiler raises anything; the work goes on without it
            print(f"not compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
            self.uncompile(model)
            self.compiled = False
        model.zero_grad(set_to_none=True)

    def uncompile(self, model: LlamaForCausalLM) -> None:
        for layer in model.model.layers:
            layer._compiled_call_impl = None

    def loss(self, model: LlamaForCausalLM) -> float:
        return held_out_loss(model, self.data.held_out, self.size.seq)

    def calibration(self, tokens: int) -> torch.Tensor:
        tokens = min(tokens, self.size.tokens // 100)
        blocks = self.data.blocks(self.size.seq, DATA_SEED)
        return torch.stack([next(blocks)[:-1] for _ in range(max(1, tokens // self.size.seq))]).long()

    def measured(self, start: float, **record: Any) -> dict[str, Any]:
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return {**record, "seconds": round(time.time() - start, 2), "peak_gpu_bytes": peak}

    def base(self, seed: int) -> dict[str, Any]:
        """Train the multi-head model."""
        start, file, size = time.time(), self.file("base", seed), self.size
        if not file.exists():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(size.config()).to(self.device)
            self.compile(model, size.batch_tokens)
            recipe = Recipe(size.tokens, size.batch_tokens, size.lr)
            batches = self.data.batches(size.tokens, size.batch_tokens, size.seq, seed)
            train(model, batches, recipe, log=lambda text: print(f"base {seed}:{text}", flush=True))
            torch.save(model.state_dict(), file)
        return self.measured(start, kind="base", seed=seed, loss=self.loss(self.load(file)))

    def convert(self, seed: int, kv_heads: int, method: str) -> dict[str, Any]:
        """Convert it, and measure it untrained."""
        teacher = self.load(self.file("base", seed))
        how = varied(method, METHODS)
        ids = self.calibration(how.tokens)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.time()
        student = convert(teacher, kv_heads, how, ids, seed)
        record = self.measured(start, kind="untrained", seed=seed, kv_heads=kv_heads, method=method)
        torch.save(student.state_dict(), self.file("student", seed, kv_heads, method))
        return {**record, "loss": self.loss(student)}

    def uptrain(
        self, seed: int, kv_heads: int, method: str, share: float, distil: bool, recipe_name: str
    ) -> dict[str, Any]:
        """Uptrain a converted model (or, with all its KV heads, the original: the control)."""
        start = time.time()
        base = self.file("base", seed)
        control = kv_heads == self.size.heads
        student = self.load(base if control else self.file("student", seed, kv_heads, method), kv_heads)
        recipe = replace(varied(recipe_name, RECIPES), tokens=round(share * self.size.tokens), distil=distil)
        recipe = replace(recipe, batch_tokens=min(recipe.batch_tokens, self.size.batch_tokens))
        teacher = self.load(base) if distil or recipe.hidden else None
        self.compile(student, recipe.batch_tokens)
        batches = self.data.batches(recipe.tokens, recipe.batch_tokens, self.size.seq, DATA_SEED)
        final = train(student, batches, recipe, teacher)
        self.uncompile(student)
        return self.measured(
            start,
            kind="uptrained",
            seed=seed,
            kv_heads=kv_heads,
            method=method,
            share=share,
            distil=distil,
            recipe=recipe_name,
            training_loss=final,
            loss=self.loss(student),
        )


_bench: Bench | None = None


def _begin(size: Size, cache: Path, device: str, compiled: bool) -> None:
    """In each worker: a GPU of its own where there are several."""
    global _bench
    if device == "cuda":
        number = (multiprocessing.current_process()._identity or (1,))[0] - 1
        device = f"cuda:{number % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    _bench = Bench(size, cache, device, compiled)


def _do(name: str, *args: Any) -> dict[str, Any]:
    assert _bench is not None
    return getattr(_bench, name)(*args)  # type: ignore[no-any-return]


class Inline:
    """The pool's interface, in this process: work is done when it is asked for."""

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*args))
        return future


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
        begin = (self.size, options.cache, options.device, options.compile)
        corpus(self.size, options.cache)  # once, before the workers read it
        if options.workers:
            context = multiprocessing.get_context("spawn")
            self.pool: Any = ProcessPoolExecutor(options.workers, context, initializer=_begin, initargs=begin)
        else:
            _begin(*begin)
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
            for process in list(self.pool._processes.values()) if self.pending else ():
                process.terminate()
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
        self.pending.append(self.pool.submit(_do, kind, *args))

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
