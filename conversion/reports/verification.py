"""Is DST the conversion of SRC that its record says it is? Everything is computed again and compared."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_attn_patch.conversion.api import StrPath
from hf_attn_patch.conversion.checkpoints.dtypes import has_nonfinite
from hf_attn_patch.conversion.checkpoints.hub import resolve
from hf_attn_patch.conversion.checkpoints.reader import Source, no_reading_errors, open_source
from hf_attn_patch.conversion.checkpoints.writer import CHUNK
from hf_attn_patch.conversion.execute import FORMAT, Opened, config_sha256, heads_sha256
from hf_attn_patch.conversion.methods.apply import compute_unit, raw_bytes
from hf_attn_patch.conversion.methods.registry import METHODS
from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.conversion.planner import make_plan
from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.documents.paths import user_path
from hf_attn_patch.documents.stranger_json import CONFIG_BYTES, parse_json_object, read_small
from hf_attn_patch.errors import ConversionError

#: relative difference that another machine's rounding makes of a merge by what the model's layers read
RUN_ROUNDING = 1e-2


@dataclass
class Verification:
    """What was compared and what differs; ``rounded`` names tensors that agree up to the last bits of their dtype."""

    differences: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    not_recomputed: list[str] = field(default_factory=list)
    heads_sha256: str | None = None  # of the source's merged tensors, as conversion.json records it
    copied: int = 0
    merged: int = 0

    @property
    def ok(self) -> bool:
        return not self.differences


def verify(src: StrPath, dst: StrPath, *, revision: str | None = None, allow_pickle: bool = False) -> Verification:
    """Compare ``dst`` with the conversion of ``src`` by the method, seed and options of its conversion.json.

    Raises:
        ConversionError: one of the two is missing or broken, or ``dst`` has no record.
    """
    folder = user_path(dst)
    record_path = folder / "conversion.json"
    if not folder.is_dir():
        raise ConversionError(f"{folder} is no folder")
    if not record_path.is_file():
        raise ConversionError(f"{folder} has no conversion.json, so it does not say how it was made")
    with no_reading_errors(str(folder)):
        record = parse_json_object(read_small(record_path, 10 * CONFIG_BYTES), str(record_path))
        result = open_source(folder)
    source = resolve(src, revision=revision, allow_pickle=allow_pickle)
    method, kv_heads, options = record.get("method"), record.get("kv_heads"), record.get("options")
    if not isinstance(method, str) or method not in METHODS or not isinstance(options, dict):
        raise ConversionError(f"{record_path} records the unknown method {method!r}")
    if not isinstance(kv_heads, (int, list, dict)):
        raise ConversionError(f"{record_path} records no number of KV heads")
    seed = record.get("seed") or 0
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConversionError(f"{record_path} records the seed {seed!r}, which is no number")
    kv_heads = _as_it_was(kv_heads, record.get("attention"))
    if isinstance(written := record.get("format", FORMAT), int) and written > FORMAT:
        raise ConversionError(f"{record_path} is of format {written}, and this version reads up to {FORMAT}: update it")
    with no_reading_errors(str(src)):
        try:
            plan = make_plan(
                source,
                kv_heads,
                method=method,
                seed=seed,
                options=options,
                with_code=bool(record.get("with_code")),
            )
        except ConversionError as error:  # of a source that was read: the record asks for what it cannot become
            return Verification([f"{source.name} cannot be converted as {record_path} says: {error}"])
        found = compare(plan, result)
    recorded = record.get("source")
    recorded = recorded if isinstance(recorded, dict) else {}
    for key, value in {"config_sha256": config_sha256(source), "heads_sha256": found.heads_sha256}.items():
        if value is not None and recorded.get(key) != value:
            found.differences.append(f"the source is not the one that was converted ({key} differs)")
    return found


def _as_it_was(kv_heads: Any, rows: Any) -> Any:
    """One number for several attentions, by their names: records of older versions meant encoders too."""
    if isinstance(kv_heads, dict) or not isinstance(rows, list) or len(rows) < 2:
        return kv_heads
    try:
        return {row["attention"]: row["kv_heads_after"] for row in rows}
    except (KeyError, TypeError):
        return kv_heads


def compare(plan: Plan, result: Source) -> Verification:
    """Compare a written result with a plan: config, headers, copied bytes, merged heads."""
    found = Verification()
    for key in sorted({*plan.new_config, *result.config}):
        if plan.new_config.get(key) != result.config.get(key):
            wanted, has = _short(plan.new_config.get(key)), _short(result.config.get(key))
            found.differences.append(f"config.json: {key} is {has} instead of {wanted}")
    for name in sorted(plan.tensors.keys() - result.tensors.keys()):
        found.differences.append(f"tensor {name!r} is missing")
    for name in sorted(result.tensors.keys() - plan.tensors.keys()):
        found.differences.append(f"tensor {name!r} is too many")
    sound = set()
    for name in plan.tensors.keys() & result.tensors.keys():
        want, got = plan.tensors[name], result.tensors[name]
        if (want.dtype, want.shape) == (got.dtype, got.shape):
            sound.add(name)
        else:
            found.differences.append(
                f"tensor {name!r} is {got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
            )
    for name in progress_bar(plan.tensors, desc="comparing copied tensors", unit="tensor", leave=False):
        if name in sound and plan.tensors[name].unit is None:
            found.copied += 1
            if not _same_bytes(plan.source, result, name):
                found.differences.append(f"tensor {name!r} is not the source's, byte for byte")
    _compare_units(plan, result, sound, found)
    return found


def _compare_units(plan: Plan, result: Source, sound: set[str], found: Verification) -> None:
    if not plan.method.exact:
        found.not_recomputed = [name for unit in plan.units for name in unit.writes]
        for name in found.not_recomputed:
            if name in sound and has_nonfinite(raw_bytes(result.read(name).contiguous()), result.tensors[name].dtype):
                found.differences.append(f"tensor {name!r} has NaN or Inf values")
        found.heads_sha256 = _heads_of(plan)
        return
    merge = plan.method.build(plan, plan.options) if plan.units else None
    digests: dict[str, str] = {}
    for unit in progress_bar(plan.units, desc="merging again", unit="unit", leave=False):
        assert merge is not None
        for name, want in compute_unit(plan, unit, merge, allow_nonfinite=True, digests=digests).items():
            if name not in sound:
                continue
            found.merged += 1
            has = result.read(name)
            if raw_bytes(has) == raw_bytes(want):
                continue
            # another machine may add in another order: allow the last two bits, or what running the model makes of them
            error = (has.double() - want.double()).abs()
            close = bool((error <= 4 * torch.finfo(want.dtype).eps * want.double().abs().max()).all())
            if close or (plan.method.runs and error.norm() <= RUN_ROUNDING * want.double().norm()):
                found.rounded.append(name)
            else:
                found.differences.append(f"tensor {name!r} differs from the recomputed one by {float(error.max()):.3g}")
    found.heads_sha256 = heads_sha256(digests)


def _heads_of(plan: Plan) -> str:
    """What conversion.json records of the source's tensors that are merged, without merging them."""
    names = dict.fromkeys(name for unit in plan.units for name in unit.reads)
    return heads_sha256(
        {name: hashlib.sha256(raw_bytes(plan.source.read(name).contiguous())).hexdigest() for name in names}
    )


def _same_bytes(source: Source, result: Source, name: str) -> bool:
    """Compare a tensor's bytes in both checkpoints, a chunk at a time."""
    if source.pickled:
        return raw_bytes(source.read(name).contiguous()) == raw_bytes(result.read(name))
    a, b = source.tensors[name], result.tensors[name]
    with Opened(source.files[a.file], os.O_RDONLY) as left, Opened(result.files[b.file], os.O_RDONLY) as right:
        for done in range(0, a.nbytes, CHUNK):
            size = min(CHUNK, a.nbytes - done)
            if os.pread(left, size, a.offset + done) != os.pread(right, size, b.offset + done):
                return False
    return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def verification_dict(found: Verification) -> dict[str, Any]:
    """``verify --json``."""
    return {
        "ok": found.ok,
        "differences": found.differences,
        "rounded": found.rounded,
        "not_recomputed": found.not_recomputed,
        "copied_tensors": found.copied,
        "merged_tensors": found.merged,
    }
