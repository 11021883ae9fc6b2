"""Carry out a plan: stream the source into the destination."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_attn_patch.errors import ConversionError

from .checkpoints.dtypes import has_nonfinite
from .checkpoints.reader import INDEX, Source
from .checkpoints.shards import Shard
from .checkpoints.writer import CHUNK, OutputFolder, check_apart, check_destination, check_space, write_at
from .families.accounts import is_buffer
from .methods.apply import compute_unit, raw_bytes, refuse_nonfinite
from .methods.method import Merge, ended
from .plan_data import Plan
from .processes import current

#: of conversion.json; raised when a reader of an older version would misread it
FORMAT = 1

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class CopiedStretch:
    """A stretch of one source file that goes unchanged to one place of an output file."""

    file: int
    source: int
    target: int
    nbytes: int
    dtype: str
    tensor: str  # the first one in it


def execute(
    plan: Plan,
    dst: Path,
    *,
    card: Callable[[Plan, dict[str, Any]], str],
    command: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    workers: int = 1,
    allow_nonfinite: bool = False,
    progress: Progress = lambda nbytes: None,
) -> dict[str, Any]:
    """Write the conversion that ``plan`` describes to ``dst``; returns what conversion.json records.

    Args:
        card: makes the text of README.md from the plan and the record.
        workers: threads (reading, hashing, merging and writing run outside Python's lock).
        progress: called with the bytes written, from any thread.

    Raises:
        ConversionError: and nothing is left behind.
    """
    if workers < 1:
        raise ConversionError(f"{workers} workers can do nothing; give at least 1")
    check_apart(plan.source.folder, dst)
    check_destination(dst, overwrite)
    processes = current()
    if not processes.main:
        return follow(plan, allow_nonfinite)
    with OutputFolder(dst, fingerprint=fingerprint(plan), overwrite=overwrite, resume=resume) as folder:
        finished = sum(
            plan.tensors[n].nbytes for s in plan.shards if f"copy {s.name}" in folder.done for n in s.tensors
        )
        check_space(dst, plan.disk_needed - finished)
        left = any(job not in folder.done for job in _unit_jobs(plan))
        processes.everybody(left)
        merge = plan.method.build(plan, plan.options) if left else _nothing
        about = getattr(merge, "record", None)
        if processes.count > 1 and plan.method.ordered and about is not None:
            about["processes"] = processes.count
        with ended(merge):
            _Work(plan, folder, merge, allow_nonfinite, progress).run(workers)
        digests = {
            name: digest for job in folder.done if job.startswith("unit ") for name, digest in folder.done[job].items()
        }
        details = folder.done.get("details") or getattr(merge, "record", None)
        record = make_record(plan, digests, command, details)
        if len(plan.shards) > 1:
            folder.write_text(INDEX, index_json(plan))
        for name in plan.source.companions:
            folder.copy(plan.source.folder / name, name)
        code = {}
        if plan.with_code:
            from hf_attn_patch.modeling.remote_code import code_files

            code = code_files(plan.new_config["model_type"])
        index = [INDEX] * (len(plan.shards) > 1)
        written = {*(s.name for s in plan.shards), *index, *plan.source.companions, *code}
        record["files"] = sorted(written | {"config.json", "conversion.json", "README.md"})
        folder.write_text("conversion.json", json.dumps(record, indent=2) + "\n")
        folder.write_text("README.md", card(plan, record))
        for name, text in code.items():
            folder.write_text(name, text)
        folder.commit(json.dumps(plan.new_config, indent=2, ensure_ascii=False) + "\n")
    processes.everybody(record)
    return record


def follow(plan: Plan, allow_nonfinite: bool) -> dict[str, Any]:
    """What a process does of :func:`execute` that is not the main one: its share of the calibration."""
    processes = current()
    (left, *_) = processes.everybody(None)
    if left and plan.method.ordered:
        merge = plan.method.build(plan, plan.options)
        with ended(merge):
            for unit in plan.units:
                compute_unit(plan, unit, merge, allow_nonfinite=allow_nonfinite, digests={})
    record: dict[str, Any] = processes.everybody(None)[0]
    return record


def _unit_jobs(plan: Plan) -> list[str]:
    """The journal's names of all that is computed; with an ordered method what it tells of itself is one of them."""
    return [f"unit {number}" for number in range(len(plan.units))] + ["details"] * plan.method.ordered


def _nothing(weights: Any) -> Any:
    return weights


class _Work:
    """The jobs of a plan: one copy per output file, one per unit. Any order gives the same bytes."""

    def __init__(
        self, plan: Plan, folder: OutputFolder, merge: Merge, allow_nonfinite: bool, progress: Progress
    ) -> None:
        self.plan, self.folder, self.merge, self.progress = plan, folder, merge, progress
        self.allow_nonfinite = allow_nonfinite
        self.place: dict[str, tuple[str, int]] = {}
        for shard in plan.shards:
            described = {name: (plan.tensors[name].dtype, plan.tensors[name].shape) for name in shard.tensors}
            offsets = folder.allocate(shard.name, described, {**_metadata(plan, shard), "format": "pt"})
            self.place.update({name: (shard.name, offset) for name, offset in offsets.items()})
        self.stop = threading.Event()

    def run(self, workers: int) -> None:
        plan = self.plan
        home = {name: shard.name for shard in plan.shards for name in shard.tensors}
        with ThreadPoolExecutor(workers) as pool:
            # a file's units come right after its copy, so that its pages are still in memory
            jobs = []
            for shard in plan.shards:
                jobs.append(pool.submit(self.guarded, self.copy, shard))
                if not plan.method.ordered:
                    mine = [i for i, unit in enumerate(plan.units) if home[unit.writes[0]] == shard.name]
                    jobs += [pool.submit(self.guarded, self.unit, i) for i in mine]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if plan.method.ordered:  # after the copies, which are quick and may find that a tensor is not finite
            # what a layer becomes depends on those below it: all of them again, unless all are there
            again = any(job not in self.folder.done for job in _unit_jobs(plan))
            for number in range(len(plan.units)):
                self.unit(number, again)
            if again:
                self.folder.mark("details", getattr(self.merge, "record", None))

    def guarded(self, function: Callable[[Any], None], argument: Any) -> None:
        if not self.stop.is_set():
            function(argument)

    def unit(self, number: int, again: bool = False) -> None:
        """Compute one unit and write its tensors, if that is not done or if it must be done ``again``."""
        unit, job = self.plan.units[number], f"unit {number}"
        if again or job not in self.folder.done:
            digests: dict[str, str] = {}
            made = compute_unit(self.plan, unit, self.merge, allow_nonfinite=self.allow_nonfinite, digests=digests)
            for name, tensor in made.items():
                file, offset = self.place[name]
                with Opened(self.folder.out / file) as descriptor:
                    write_at(descriptor, raw_bytes(tensor), offset)
            self.folder.mark(job, digests)
        self.progress(sum(self.plan.tensors[name].nbytes for name in unit.writes))

    def copy(self, shard: Shard) -> None:
        """Copy what is not attention into one output file, looking for NaN and Inf on the way."""
        job, plan = f"copy {shard.name}", self.plan
        kept = [name for name in shard.tensors if plan.tensors[name].unit is None]
        if job in self.folder.done:
            self.progress(sum(plan.tensors[name].nbytes for name in kept))
            return
        with Opened(self.folder.out / shard.name) as target:
            if plan.source.pickled:
                for name in kept:
                    raw = raw_bytes(plan.source.read(name).contiguous())
                    self.check(raw, plan.tensors[name].dtype, name)
                    write_at(target, raw, self.place[name][1])
                    self.progress(len(raw))
            else:
                buffer = memoryview(bytearray(CHUNK))
                for run in runs(plan.source, kept, self.place):
                    self.stream(run, target, buffer)
        self.folder.mark(job)

    def stream(self, run: CopiedStretch, target: int, buffer: memoryview) -> None:
        path = self.plan.source.files[run.file]
        with Opened(path, os.O_RDONLY) as source:
            done = 0
            while done < run.nbytes:
                if self.stop.is_set():
                    return
                part = buffer[: min(CHUNK, run.nbytes - done)]
                if os.preadv(source, [part], run.source + done) != len(part):
                    raise ConversionError(f"{path} changed while it was read: tensor {run.tensor!r} is cut off")
                if not self.allow_nonfinite and has_nonfinite(part, run.dtype):
                    self.name_the_culprit(run)
                write_at(target, part, run.target + done)
                done += len(part)
                self.progress(len(part))

    def check(self, raw: memoryview, dtype: str, name: str) -> None:
        if not self.allow_nonfinite and not is_buffer(name, self.plan.source.tensors[name].shape):
            refuse_nonfinite(raw, dtype, name)

    def name_the_culprit(self, run: CopiedStretch) -> None:
        """Find which tensor of a run has the NaN or Inf."""
        source = self.plan.source
        for name, tensor in source.tensors.items():
            if tensor.file == run.file and run.source <= tensor.offset < run.source + run.nbytes:
                self.check(raw_bytes(source.read(name)), tensor.dtype, name)


class Opened:
    """A file descriptor that closes itself."""

    def __init__(self, path: Path, flags: int = os.O_WRONLY) -> None:
        self.path, self.flags = path, flags

    def __enter__(self) -> int:
        self.descriptor = os.open(self.path, self.flags)
        return self.descriptor

    def __exit__(self, *exc: object) -> None:
        os.close(self.descriptor)


def runs(source: Source, names: list[str], place: dict[str, tuple[str, int]]) -> list[CopiedStretch]:
    """Join tensors that lie side by side on both sides and have one dtype."""
    out: list[CopiedStretch] = []
    for name in names:
        info, target = source.tensors[name], place[name][1]
        last = out[-1] if out else None
        if last is not None and (last.file, last.source + last.nbytes, last.target + last.nbytes, last.dtype) == (
            info.file, info.offset, target, info.dtype,
        ):  # fmt: skip
            out[-1] = CopiedStretch(
                last.file, last.source, last.target, last.nbytes + info.nbytes, last.dtype, last.tensor
            )
        else:
            out.append(CopiedStretch(info.file, info.offset, target, info.nbytes, info.dtype, name))
    return out


def _metadata(plan: Plan, shard: Shard) -> dict[str, str]:
    return plan.source.metadata[plan.source.tensors[shard.tensors[0]].file]


def index_json(plan: Plan) -> str:
    """The index of a sharded result, as transformers writes it."""
    weight_map = {name: shard.name for shard in plan.shards for name in shard.tensors}
    return json.dumps({"metadata": {"total_size": plan.bytes_after}, "weight_map": weight_map}, indent=2) + "\n"


def fingerprint(plan: Plan) -> str:
    """All that decides the bytes of the result, for ``--resume``."""
    from hf_attn_patch import __version__

    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in plan.source.files]
    tensors = [(name, t.dtype, t.shape, t.unit) for name, t in plan.tensors.items()]
    shards = [(shard.name, shard.tensors) for shard in plan.shards]
    parts = [__version__, str(plan.source.folder.resolve()), files, plan.new_config, plan.method.name, plan.options]
    text = json.dumps([*parts, plan.seed, tensors, shards], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def config_sha256(source: Source) -> str:
    """sha256 of the source's config, whatever its white space and order."""
    return hashlib.sha256(json.dumps(source.config, sort_keys=True).encode()).hexdigest()


def heads_sha256(digests: Mapping[str, str]) -> str:
    """One sha256 of every tensor that was merged, from the tensors' names and own sha256."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def make_record(plan: Plan, digests: dict[str, str], command: str | None, details: Any = None) -> dict[str, Any]:
    """The content of conversion.json."""
    import platform

    import safetensors
    import torch
    import transformers

    from hf_attn_patch import __version__

    from .reports.report import stack_rows

    source = plan.source
    return {
        "format": FORMAT,
        "hf_attn_patch": __version__,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        "command": command,
        "source": {
            "name": source.name,
            "revision": source.revision,
            "model_type": source.config.get("model_type"),
            "files": {path.name: path.stat().st_size for path in source.files},
            "config_sha256": config_sha256(source),
            "heads_sha256": heads_sha256(digests),
        },
        "method": plan.method.name,
        "options": plan.options,
        "seed": plan.seed,
        "kv_heads": plan.requested,
        "with_code": plan.with_code,
        "attention": stack_rows(plan),
        "details": details,
    }
