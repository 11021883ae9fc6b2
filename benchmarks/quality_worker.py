"""One process's share of ``quality.py``'s work: a base model, a conversion or an uptraining, and its record."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.code_lm import Corpus, Recipe, Size, autocast, corpus, forward, held_out_loss, train
from benchmarks.quality_methods import METHODS, RECIPES, convert, varied
from hf_attn_patch.compat.python import process_number
from hf_attn_patch.compat.torch import one_graph_a_shape, recompile_limit_at_least, uncompile

DATA_SEED = 1000  # of the uptraining text; the base model's is its own seed


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
        recompile_limit_at_least(64)
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # in each of several workers
        one_graph_a_shape()  # few shapes, each worth a graph of its own
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
            uncompile(layer)

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


def begin(size: Size, cache: Path, device: str, compiled: bool) -> None:
    """In each worker: a GPU of its own where there are several."""
    global _bench
    if device == "cuda":
        device = f"cuda:{process_number() % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    _bench = Bench(size, cache, device, compiled)


def do(name: str, *args: Any) -> dict[str, Any]:
    assert _bench is not None
    return getattr(_bench, name)(*args)  # type: ignore[no-any-return]


class Inline:
    """The pool's interface, in this process: work is done when it is asked for."""

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*args))
        return future
