"""``plan`` and ``convert`` for Python; the command line calls the same two."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hf_attn_patch.documents.paths import user_path

from .checkpoints.hub import resolve
from .checkpoints.reader import no_reading_errors
from .checkpoints.shards import parse_size
from .loadcheck import check_loads
from .plan_data import KVHeads, Plan
from .planner import make_plan

StrPath = str | os.PathLike[str]


def plan(
    src: StrPath,
    kv_heads: KVHeads,
    *,
    method: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    allow_pickle: bool = False,
    max_shard_size: int | str | None = None,
    check_load: bool = True,
    with_code: bool = False,
    **options: Any,
) -> Plan:
    """What :func:`convert` would do, from config and tensor headers alone: no weights are read.

    Args:
        src: a checkpoint folder or a hub id.
        kv_heads: HKV of the result: one number; a list with one per layer (where the architecture can express
            it); or ``{attention: number or list}`` for models with several attentions.
        method: how heads are merged; see ``METHODS`` of ``methods/registry.py``, and ``auto``. None: ``auto``,
            which is ``calibrated`` with ``calibrate=``, a calibration text, and ``aligned`` without.
        seed: for methods that draw numbers.
        revision: branch, tag or commit of a hub id.
        allow_pickle: read ``pytorch_model.bin`` (with ``weights_only=True``) where there is no safetensors file.
        max_shard_size: bytes (or "5GB") of an output file; None keeps the source's sharding.
        check_load: also build the model on the meta device, to see that source and result load without a missing
            or a wrong tensor.
        with_code: for a result whose model class is one of ``hf_attn_patch.modeling``: let it carry that code, so that
            ``trust_remote_code=True`` loads it where this package is not installed.
        options: the method's own.

    Raises:
        ConversionError: it cannot be done; the message says why.
    """
    source = resolve(src, revision=revision, allow_pickle=allow_pickle)
    size = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    with no_reading_errors(str(src)):
        made = make_plan(
            source, kv_heads, method=method, seed=seed, options=options, max_shard_size=size, with_code=with_code
        )
        if check_load:
            check_loads(made)
    return made


def convert(
    src: StrPath | Plan,
    dst: StrPath,
    kv_heads: KVHeads | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    workers: int = 1,
    allow_nonfinite: bool = False,
    command: str | None = None,
    progress: Callable[[int], object] = lambda nbytes: None,
    dequantize: bool = False,
    **plan_arguments: Any,
) -> dict[str, Any]:
    """Write the conversion of ``src`` to the folder ``dst``, which appears whole or not at all.

    Args:
        src: a checkpoint folder, a hub id, or a :class:`Plan` that was made already.
        dst: a folder that does not exist yet (or an old checkpoint, with ``overwrite``).
        kv_heads: as for :func:`plan`.
        resume: go on where a killed run of the same conversion stopped.
        workers: threads.
        allow_nonfinite: convert weights with NaN or Inf.
        command: recorded in conversion.json.
        progress: called with the bytes written since the last call.
        dequantize: unpack a quantized ``src`` first (a GGUF file, FP8, MXFP4, ...), into a folder beside ``dst`` that
            is gone afterwards.
        plan_arguments: the other arguments of :func:`plan`.

    Returns:
        what ``conversion.json`` records.

    Raises:
        ConversionError: it cannot be done; nothing is left behind.
    """
    from .checkpoints.writer import check_apart, check_destination
    from .execute import execute
    from .reports.card import model_card

    target = user_path(dst)
    if isinstance(src, Plan):
        made = src
    else:
        if kv_heads is None:
            raise TypeError("convert() needs kv_heads")
        if user_path(src).exists():
            check_apart(user_path(src), target)
        check_destination(target, overwrite)
        if dequantize:
            from .unpacking import dequantized

            with dequantized(src, target, revision=plan_arguments.pop("revision", None)) as folder:
                made = plan(folder, kv_heads, **plan_arguments)
                made.source.name = os.fspath(src)
                return convert(
                    made, target, overwrite=overwrite, workers=workers, allow_nonfinite=allow_nonfinite,
                    command=command, progress=progress,
                )  # fmt: skip
        made = plan(src, kv_heads, **plan_arguments)
    with no_reading_errors(made.source.name):
        return execute(
            made, target, card=model_card, command=command, overwrite=overwrite, resume=resume, workers=workers,
            allow_nonfinite=allow_nonfinite, progress=progress,
        )  # fmt: skip
