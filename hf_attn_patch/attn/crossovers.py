"""Where one backend becomes faster than another: the numbers behind the ladder.

They were measured on one H200. ``hf-attn bench --tune`` measures them anew and writes a small file for this GPU, which
counts from then on. What is computed does not depend on them.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from hf_attn_patch.errors import AttentionError

from .request import AttentionRequest

FORMAT = 1


@dataclass(frozen=True)
class Crossovers:
    """Measured numbers, all integers from 0.

    Args:
        small_work_bits: bits of B * HQ * Sq * Sk * D up to which the host's time counts more than the device's, so
            that torch's own kernels are quicker than FlashAttention-4 with its Python.
        decode_rows: queries that share a KV head (G * Sq), up to which our decoding kernel is the fastest.
        filling_streams: B * HKV from which FlashAttention-4, which splits no KV head, fills the GPU with few queries.
            On a GPU that was tuned without FlashAttention-4, torch's kernel takes its place in both.
    """

    small_work_bits: int = 31
    decode_rows: int = 32
    filling_streams: int = 96


#: the GPU whose numbers are shipped (``benchmarks/results``)
MEASURED_ON = "NVIDIA H200"
SHIPPED = Crossovers()
_forced: ContextVar[Crossovers | None] = ContextVar("hf_attn_patch_crossovers", default=None)


def crossovers() -> Crossovers:
    """The numbers that count on this machine: those of :func:`tuning_file` if it is there, else the shipped ones.

    Raises:
        AttentionError: the file is broken, or of another GPU.
    """
    return _forced.get() or _of_this_machine()


@functools.cache
def _of_this_machine() -> Crossovers:
    if not torch.cuda.is_available():
        return SHIPPED
    path = tuning_file(torch.cuda.get_device_name())
    return read(path, torch.cuda.get_device_name()) if path.exists() else SHIPPED


def never_tuned() -> str | None:
    """A sentence where the numbers that count are another GPU's than this machine's; None where they are its own."""
    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_name()
    if MEASURED_ON in gpu or tuning_file(gpu).exists():
        return None
    return (
        f"never tuned for {gpu}: the order of the backends is that of an {MEASURED_ON}; "
        "`hf-attn bench --tune` measures it here, in about a minute"
    )


@contextmanager
def using(numbers: Crossovers) -> Iterator[None]:
    """Count with other numbers for a block (choices that were made before are remembered: see ``plan.forget``)."""
    before = _forced.set(numbers)
    try:
        yield
    finally:
        _forced.reset(before)


def tuning_file(gpu: str) -> Path:
    """Where the numbers of a GPU are kept: ``$HF_ATTN_TUNING``, or a file named after it in the user's cache folder."""
    if named := os.environ.get("HF_ATTN_TUNING"):
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # a user may have no home
    return cache / "hf_attn_patch" / f"crossovers-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.json"


def write(path: Path, gpu: str, numbers: Crossovers) -> None:
    """Write a tuning file, whole or not at all; its numbers count in this process too, once ``plan.forget`` was
    called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "gpu": gpu, "torch": torch.__version__, "crossovers": asdict(numbers)}
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)
    _of_this_machine.cache_clear()


def read(path: Path, gpu: str) -> Crossovers:
    """The numbers in a tuning file.

    Raises:
        AttentionError: it cannot be read, is not such a file, or is of another GPU.
    """
    way_out = "delete it, or write it anew with `hf-attn bench --tune`"
    try:
        content: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AttentionError(f"the tuning file {path} cannot be read ({error}); {way_out}") from error
    numbers = content.get("crossovers") if isinstance(content, dict) else None
    if not isinstance(numbers, dict) or content.get("format") != FORMAT:
        raise AttentionError(f"{path} is not a tuning file of format {FORMAT}; {way_out}")
    if content.get("gpu") != gpu:
        raise AttentionError(
            f"the tuning file {path} was measured on {content.get('gpu')!r}, not on {gpu!r}; {way_out}"
        )
    names = {f.name for f in fields(Crossovers)}
    wrong = sorted(names.symmetric_difference(numbers))
    wrong += sorted(n for n in names & set(numbers) if type(numbers[n]) is not int or numbers[n] < 0)
    if wrong:
        raise AttentionError(
            f"the tuning file {path} should have the integers {', '.join(sorted(names))}; wrong are "
            f"{', '.join(wrong)}; {way_out}"
        )
    return Crossovers(**numbers)


def is_small(request: AttentionRequest) -> bool:
    """So little work that the host's time counts most (never inside torch.compile, where lengths are not known)."""
    return request.q_class > 16 and 0 <= request.work_bits <= crossovers().small_work_bits


def has_many_rows(request: AttentionRequest) -> bool:
    """A few queries that are too many for our decoding kernel, over enough KV heads for FlashAttention-4."""
    if not request.rows:  # many queries, or torch.compile, which cannot trace the question for the GPU's name
        return False
    numbers = crossovers()
    return request.rows > numbers.decode_rows and request.streams >= numbers.filling_streams
