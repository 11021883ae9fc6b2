"""Whole models, tokens a second: transformers with this package's attention, cache and unpadding, against its own.

    python benchmarks/models.py                          # under four minutes on one H200
    python benchmarks/models.py --sections decode,train --peers sdpa --kv-heads 8,32
    python benchmarks/models.py --tiny                   # a smoke test on a CPU

Llama-2-7B's shapes with 8 layers and random weights, in bf16. Every implementation first passes the conformance rule on
a two-layer model; then, at each row's own shape, its logits (or loss and gradients) are held against transformers' sdpa
before it is timed. Peers and ours run in one process on the same weights and inputs. "Real" tokens are those that are
not padding. Decoding calls the model as generate() does, on a cache that is filled with random keys and values.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, StaticCache

import hf_attn_patch
from benchmarks import assert_conforms
from benchmarks.measure import DEVICE, environment, headline, limits, median_seconds, synchronize, table, write_json

PEERS = ("sdpa", "flash_attention_4", "flex_attention", "eager")
OURS = "hf_attn_patch"
AHEAD = 512  # tokens that decoding may go beyond the row's length
FULL = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Row:
    """One line of work; ``form``: "full", "padded" or "packed"."""

    kind: str
    B: int
    S: int
    form: str
    kv_heads: tuple[int, ...] = (8,)

    @property
    def name(self) -> str:
        form = "" if self.form == "full" else f", {self.form}"
        return f"{self.kind}{form}, B{self.B} S{self.S}"


ROWS = (
    Row("decode", 16, 8192, "padded", (8, 32, 1)),
    Row("decode", 16, 8192, "full", (8, 32, 1)),
    Row("decode", 1, 65536, "full", (8, 32, 1)),
    Row("decode", 1, 512, "full", (8, 32, 1)),
    Row("prefill", 8, 4096, "padded", (8, 32)),
    Row("train", 8, 2048, "full", (8, 32)),
    Row("train", 8, 2048, "padded", (8, 32)),
    Row("train", 1, 16384, "packed", (8, 32)),
)


@dataclass(frozen=True)
class Variant:
    """An implementation and what of this package is used with it."""

    attention: str
    growing: bool = False
    graphs: bool = False
    unpadded: bool = False
    static: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        extras = (
            " + GrowingCache" * self.growing,
            ", graphs" * self.graphs,
            " + StaticCache" * self.static,
            ", compiled" * self.compiled,
            " + unpadded" * self.unpadded,
        )
        return self.attention + "".join(extras)


def variants(row: Row, peers: tuple[str, ...], static: bool) -> list[Variant]:
    theirs, ours = [Variant(name) for name in peers], [Variant(OURS)]
    if row.kind == "decode":
        ours += [Variant(OURS, growing=True), Variant(OURS, growing=True, graphs=True)]
        if DEVICE == "cuda":
            ours.append(Variant(OURS, growing=True, graphs=True, compiled=True))
        if static:  # as generate(cache_implementation="static") runs it on a GPU
            ours.append(Variant(OURS, static=True, compiled=True))
            theirs += [Variant("sdpa", static=True, compiled=True)] * ("sdpa" in peers)
    elif row.form == "padded":
        ours.append(Variant(OURS, unpadded=True))
    return theirs + ours


def build(kv_heads: int, sizes: dict[str, int], dtype: torch.dtype, **changes: int) -> Any:
    """A Llama with random weights; the number of KV heads is scaled down with the heads in a tiny one."""
    heads = sizes["num_attention_heads"]
    config = LlamaConfig(**{**sizes, **changes}, num_key_value_heads=max(1, kv_heads * heads // 32))
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def switch(model: Any, variant: Variant) -> Any:
    """The model with the variant's attention; a context within which it is unpadded or not."""
    if variant.attention == OURS:
        hf_attn_patch.enable(model, cuda_graphs="compiled" if variant.graphs and variant.compiled else variant.graphs)
    else:
        model.set_attn_implementation(variant.attention)
    return hf_attn_patch.unpadded(model) if variant.unpadded else nullcontext()


def new_cache(model: Any, variant: Variant, room: int) -> Cache:
    if variant.static:
        return StaticCache(config=model.config, max_cache_len=room)
    kind = hf_attn_patch.GrowingCache if variant.growing else DynamicCache
    return kind(config=model.config)


class Inputs:
    """The tokens of one row: lengths between S/8 and S where padded, documents of S/64 to S/4 where packed."""

    def __init__(self, row: Row, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(7)
        B, S = row.B, row.S
        self.ids = torch.randint(3, vocabulary, (B, S), generator=generator).to(DEVICE)
        self.lengths = [S] * B
        if row.form == "padded":
            self.lengths = torch.randint(S // 8, S + 1, (B,), generator=generator).tolist()
            self.lengths[0] = S
        elif row.form == "packed":
            self.lengths = []
            while sum(self.lengths) < S:
                length = int(torch.randint(max(1, S // 64), S // 4 + 1, (1,), generator=generator))
                self.lengths.append(min(length, S - sum(self.lengths)))
        self.tokens = sum(self.lengths)
        lengths = torch.tensor(self.lengths, device=DEVICE)
        columns = torch.arange(S, device=DEVICE)
        if row.form == "packed":
            self.mask = None
            self.positions = torch.cat([torch.arange(n, device=DEVICE) for n in self.lengths])[None]
            borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            longest = max(self.lengths)
            self.extra = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
            self.extra |= {"max_length_q": longest, "max_length_k": longest}
        else:
            left = row.kind != "train"  # generation pads on the left, training on the right
            real = columns >= S - lengths[:, None] if left else columns < lengths[:, None]
            self.mask = real.long()
            self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
            self.extra = {}
        self.labels = self.ids if self.mask is None else self.ids.where(self.mask == 1, -100)
        if self.mask is None:  # a document's first token is nobody's target
            self.labels = self.ids.index_fill(1, self.extra["cu_seq_lens_q"][:-1].long(), -100)


def prefill(model: Any, variant: Variant, inputs: Inputs) -> tuple[Callable[[], Any], Callable[[], list[torch.Tensor]]]:
    @torch.no_grad()
    def work() -> Any:
        cache = new_cache(model, variant, inputs.ids.shape[1])
        return model(
            input_ids=inputs.ids,
            attention_mask=inputs.mask,
            position_ids=inputs.positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    return work, lambda: [work().logits]


def decode(model: Any, variant: Variant, inputs: Inputs) -> tuple[Callable[[], Any], Callable[[], list[torch.Tensor]]]:
    config, (B, S) = model.config, inputs.ids.shape
    cache = new_cache(model, variant, S + AHEAD)
    generator = torch.Generator(DEVICE).manual_seed(11)
    with torch.no_grad():
        for layer in range(config.num_hidden_layers):
            shape = (B, config.num_key_value_heads, S, config.head_dim)
            options: Any = {"generator": generator, "device": DEVICE, "dtype": model.dtype}
            cache.update(torch.randn(shape, **options), torch.randn(shape, **options), layer)
    assert inputs.mask is not None
    mask = torch.nn.functional.pad(inputs.mask, (0, AHEAD), value=1)
    position = inputs.mask.sum(1, keepdim=True) - 1
    if variant.static:
        return decode_compiled(model, cache, inputs, position)

    @torch.no_grad()
    def work() -> Any:
        length = int(cache.get_seq_length())
        return model(
            input_ids=inputs.ids[:, -1:],
            attention_mask=mask[:, : length + 1],
            position_ids=position + (length - S + 1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    return work, lambda: [work().logits]


def decode_compiled(
    model: Any, cache: Cache, inputs: Inputs, position: torch.Tensor
) -> tuple[Callable[[], Any], Callable[[], list[torch.Tensor]]]:
    """One step under torch.compile with CUDA graphs: the 4-D mask is made outside the graph, as generate does."""
    assert inputs.mask is not None
    S = inputs.ids.shape[1]
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    room = cache.layers[0].keys.shape[2]
    valid = torch.nn.functional.pad(inputs.mask, (0, room - S), value=0).bool()
    state = {"length": S}

    @torch.no_grad()
    def work() -> Any:
        length = state["length"]
        state["length"] = length + 1
        valid[:, length] = True
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(
            input_ids=inputs.ids[:, -1:].clone(),
            attention_mask=valid[:, None, None, :].clone(),
            position_ids=position + (length - S + 1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    return work, lambda: [work().logits.clone()]


def train(model: Any, variant: Variant, inputs: Inputs) -> tuple[Callable[[], Any], Callable[[], list[torch.Tensor]]]:
    def work() -> Any:
        model.zero_grad(set_to_none=True)
        output = model(
            input_ids=inputs.ids,
            attention_mask=inputs.mask,
            position_ids=inputs.positions,
            labels=inputs.labels,
            use_cache=False,
            **inputs.extra,
        )
        output.loss.backward()
        return output.loss.detach()

    def result() -> list[torch.Tensor]:
        loss = work()
        first = model.model.layers[0].self_attn
        return [loss[None], first.q_proj.weight.grad.clone(), first.k_proj.weight.grad.clone()]

    return work, result


KINDS = {"prefill": prefill, "decode": decode, "train": train}


def assert_agrees(found: list[torch.Tensor], reference: list[torch.Tensor]) -> None:
    """Two implementations in low precision, at full size: relative L2 distance under 5%."""
    for a, b in zip(found, reference, strict=True):
        distance = float((a.double() - b.double()).norm() / b.double().norm())
        if not distance < 0.05:
            raise AssertionError(f"differs from sdpa by {distance:.2g}")


def check_conformance(variant: Variant, kv_heads: int, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """On two layers and a padded batch: no further from fp32 (fp64) than twice what eager is in this precision."""
    high = torch.float64 if dtype is torch.float32 else torch.float32
    low_model = build(kv_heads, sizes, dtype, num_hidden_layers=2, vocab_size=128)
    row = Row("train", 3, 160, "padded")
    inputs = Inputs(row, 128)
    assert inputs.mask is not None
    call = {"input_ids": inputs.ids, "attention_mask": inputs.mask, "use_cache": False}
    real = inputs.mask == 1
    with torch.no_grad():
        low_model.set_attn_implementation("eager")
        low = low_model(**call).logits[real]
        reference = copy.deepcopy(low_model).to(high)(**call).logits[real]
        with switch(low_model, variant):
            found = low_model(**call).logits[real]
    assert_conforms(found, low, reference)


def bound(model: Any, row: Row, inputs: Inputs, limit: dict[str, float]) -> float:
    """The seconds that the bytes (decode) or the arithmetic (prefill, training) take at this machine's limits."""
    config = model.config
    layer_weights = sum(p.numel() for p in model.model.layers.parameters())
    head_weights = model.lm_head.weight.numel()
    width = config.num_attention_heads * config.head_dim
    if row.kind == "decode":
        kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * inputs.tokens
        return (kv + layer_weights + head_weights) * model.dtype.itemsize / limit["copy_bytes"]
    pairs = sum(n * (n + 1) // 2 for n in inputs.lengths)
    head_tokens = inputs.tokens if row.kind == "train" else row.B
    flops = 2 * (layer_weights * inputs.tokens + head_weights * head_tokens)
    flops += 4 * width * pairs * config.num_hidden_layers
    return (3 if row.kind == "train" else 1) * flops / limit["matmul_flops"]


def measure(model: Any, row: Row, variant: Variant, inputs: Inputs, reference: list[torch.Tensor]) -> float:
    """Median seconds of one call, after it was found to be right."""
    model.train(row.kind == "train")
    with switch(model, variant):
        work, result = KINDS[row.kind](model, variant, inputs)
        assert_agrees(result(), reference)
        repeats = {"decode": 25, "prefill": 7, "train": 5}[row.kind]
        return median_seconds(work, warmup=2, repeats=repeats, seconds=3.0)


def plan(args: argparse.Namespace) -> Iterator[tuple[int, Row, Variant]]:
    """Ours and the fast peers first, so that what time is left for goes to the slow ones."""
    fast = tuple(p for p in args.peers if p in ("sdpa", "flash_attention_4"))
    slow = tuple(p for p in args.peers if p not in fast)
    for peers, ours in ((fast, True), (slow, False)):
        for kv_heads in args.kv_heads:
            for row in args.rows:
                if kv_heads in row.kv_heads:
                    for variant in variants(row, peers, args.static):
                        if ours or variant.attention != OURS:
                            yield kv_heads, row, variant


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def bench(args: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    limit, env = limits(args.tiny), environment()
    print(headline(limit, env), flush=True)
    sizes, dtype = (TINY, torch.float32) if args.tiny else (FULL, torch.bfloat16)
    results: list[dict[str, Any]] = []
    conforms: dict[Variant, str] = {}
    built, at, model, inputs, reference = None, None, None, None, None
    for kv_heads, row, variant in plan(args):
        entry: dict[str, Any] = {"work": row.name, "implementation": variant.name, **asdict(row), "kv_heads": kv_heads}
        results.append(entry)
        if time.perf_counter() - begin > args.seconds:
            entry["failed"] = "not run: out of time (--seconds)"
            continue
        try:
            if variant not in conforms:
                conforms[variant] = ""
                try:
                    check_conformance(variant, kv_heads, sizes, dtype)
                except Exception as error:
                    conforms[variant] = f"{type(error).__name__}: {error}".splitlines()[0]
                free()
            if conforms[variant]:
                raise RuntimeError(conforms[variant])
            if built != kv_heads:
                model = inputs = reference = None
                free()
                model, built, at = build(kv_heads, sizes, dtype), kv_heads, None
            if at != row:
                at, inputs = row, Inputs(row, sizes["vocab_size"])
                sdpa = Variant("sdpa")
                model.train(row.kind == "train")
                with switch(model, sdpa):
                    reference = KINDS[row.kind](model, sdpa, inputs)[1]()
            assert inputs is not None
            assert reference is not None
            seconds = measure(model, row, variant, inputs, reference)
            tokens = row.B if row.kind == "decode" else inputs.tokens
            entry |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
            entry["share_of_limit"] = bound(model, row, inputs, limit) / seconds
        except Exception as error:  # reported in the table, and by the exit status if it is ours
            entry["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if model is not None:
            model.zero_grad(set_to_none=True)
        free()
        speed = entry.get("failed") or f"{entry['tokens_per_second']:,.0f} tokens/s"
        print(f"  {row.name}, {kv_heads} KV heads, {variant.name}: {speed}", flush=True)
    synchronize()
    return {
        "environment": env,
        "limits": limit,
        "sizes": sizes,
        "seconds": time.perf_counter() - begin,
        "rows": results,
    }


def report(result: dict[str, Any]) -> str:
    lines = []
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in result["rows"]:
        groups.setdefault((entry["work"], entry["kv_heads"]), []).append(entry)
    for (work, kv_heads), entries in groups.items():
        peers = [e["tokens_per_second"] for e in entries if not e["implementation"].startswith(OURS) and "seconds" in e]
        for e in entries:
            if "seconds" not in e:
                lines.append((work, str(kv_heads), e["implementation"], e["failed"][:60], "", "", ""))
                continue
            ratio = f"{e['tokens_per_second'] / max(peers):.2f}" if peers else ""
            speed, share = f"{e['tokens_per_second']:,.0f}", f"{e['share_of_limit']:.2f}"
            lines.append((work, str(kv_heads), e["implementation"], speed, f"{e['seconds'] * 1e3:.2f}", ratio, share))
    return table(("work", "KV heads", "implementation", "tokens/s", "ms", "x best peer", "of limit"), lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="decode,prefill,train", help="kinds of work, comma-separated")
    parser.add_argument("--peers", default=",".join(PEERS), help="implementations to compare with; '' for none")
    parser.add_argument("--kv-heads", default="8,32,1", help="of 32 query heads")
    parser.add_argument("--forms", default="full,padded,packed")
    parser.add_argument("--static", action="store_true", help="StaticCache and torch.compile too, in decoding")
    parser.add_argument("--seconds", type=float, default=220, help="start nothing after so many seconds")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see it run on a CPU")
    parser.add_argument("--out", type=Path, help="a .json file or a folder; default $OUT, else the working directory")
    args = parser.parse_args(argv)
    args.peers = tuple(p for p in args.peers.split(",") if p)
    args.kv_heads = tuple(int(n) for n in args.kv_heads.split(","))
    kinds, forms = args.sections.split(","), args.forms.split(",")
    args.rows = [row for row in ROWS if row.kind in kinds and row.form in forms]
    if args.tiny:
        args.rows = [Row(r.kind, min(r.B, 3), 128, r.form, r.kv_heads) for r in args.rows if r.S < 20000]
        args.peers = tuple(p for p in args.peers if p in ("sdpa", "eager"))
    result = bench(args)
    text = report(result)
    path = write_json(result, args.out, "models")
    print(f"\n{text}\n\n{result['seconds']:.0f} s; {path}")
    ours = [e for e in result["rows"] if e["implementation"].startswith(OURS)]
    return int(any("failed" in e and "out of time" not in e["failed"] for e in ours))


if __name__ == "__main__":
    sys.exit(main())
