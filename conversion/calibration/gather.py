"""The calibration text of a conversion: what the model writes itself, installed text, and the user's, by shares."""

from __future__ import annotations

import copy
import hashlib
import os
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.conversion.processes import current
from hf_attn_patch.errors import ConversionError

from .own_samples import own_samples
from .text import calibration_ids

#: what stands for text that the model writes itself
OWN = "own"


def parse_sources(text: str) -> list[tuple[str, float]]:
    """Sources with their shares: ``TEXT``, or several with commas, each perhaps with ``:SHARE``.

    Raises:
        ConversionError: a share is not above 0, or a source has no name.

    >>> parse_sources("own,python"), parse_sources("own:1,notes.txt:2,own:1")
    ([('own', 0.5), ('python', 0.5)], [('own', 0.5), ('notes.txt', 0.5)])
    """
    if os.path.exists(os.path.expanduser(text)):
        return [(text, 1.0)]
    found: list[tuple[str, float]] = []
    for part in text.split(","):
        name, _, share = part.strip().rpartition(":")
        try:
            found.append((name, float(share)) if name else (part.strip(), 1.0))
        except ValueError:  # a colon that is part of a name
            found.append((part.strip(), 1.0))
    if any(not 0 < share < float("inf") for _, share in found):
        raise ConversionError(f"--calibrate {text}: shares are numbers above 0, as in own:1,notes.txt:3")
    if not all(name for name, _ in found):
        raise ConversionError(f"--calibrate {text}: there is no source between two commas, or behind the last one")
    total = sum(share for _, share in found)
    shares: dict[str, float] = {}
    for name, number in found:  # one that is named twice is one source: its text is not read twice
        shares[name] = shares.get(name, 0.0) + number / total
    return list(shares.items())


def reads_text(calibrate: str) -> bool:
    """Whether some of the calibration text is not the model's own."""
    return any(name != OWN for name, _ in parse_sources(calibrate))


def writes_itself(calibrate: str) -> bool:
    """Whether some of the calibration text is to be the model's own."""
    return any(name == OWN for name, _ in parse_sources(calibrate))


def gathered(
    plan: Plan, model: Any, tokenizer: Any, calibrate: str, *, tokens: int, length: int | None, longest: int,
    whole: bool, device: torch.device,
) -> tuple[Tensor, dict[str, Any], list[str]]:  # fmt: skip
    """Sequences of calibration text from all its sources, in an order drawn by the plan's seed.

    Args:
        model: the original, on any device; a copy on ``device`` writes.
        tokenizer: None where only the model writes.
        whole: see :func:`~.text.calibration_ids`, as ``tokens``, ``length`` and ``longest``.

    Returns:
        ids [N, S] int64, what to record of them, and notes for the user.

    Raises:
        ConversionError: a source is missing, too short, or the model cannot write.
    """
    sources = parse_sources(calibrate)
    if len(sources) == 1 and sources[0][0] != OWN:
        return calibration_ids(
            tokenizer, sources[0][0], tokens=tokens, length=length, longest=longest, seed=plan.seed, whole=whole
        )
    size = length or longest
    parts: list[Tensor] = []
    about: dict[str, Any] = {"source": calibrate, "seed": plan.seed, "parts": {}}
    notes: list[str] = []
    for name, share in sources:
        wanted = max(size, round(share * tokens))
        if name == OWN:
            ids = _written(plan, model, wanted, size, device)
        else:
            ids, _, said = calibration_ids(
                tokenizer, name, tokens=wanted, length=size, longest=longest, seed=plan.seed, whole=whole
            )
            notes += said
            if ids.shape[1] != size:
                raise ConversionError(
                    f"--calibrate {name}: {ids.shape[1]} tokens are no whole sequence of {size}; give more of it, or"
                    f" --calibration-length {ids.shape[1]}"
                )
        parts.append(ids)
        about["parts"][name] = ids.numel()
    ids = torch.cat(parts)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(plan.seed))]
    about |= {"sequences": len(ids), "length": ids.shape[1], "tokens": ids.numel()}
    about["ids_sha256"] = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    return ids, about, notes


def _written(plan: Plan, model: Any, tokens: int, length: int, device: torch.device) -> Tensor:
    writer = model if model.device == device else copy.deepcopy(model).to(device)
    row_bytes = (
        length
        * sum(layer.kv_heads * (layer.head_dim + layer.value_dim) for layer in plan.layers)
        * writer.dtype.itemsize
    )
    processes, rows = current(), max(1, tokens // length)
    share = processes.share(rows)
    mine = share.stop - share.start
    with processes.all_or_none():
        ids = (
            own_samples(writer, mine * length, length, seed=processes.seed(plan.seed), row_bytes=row_bytes)
            if mine
            else torch.empty(0, length, dtype=torch.int64)
        )
    return processes.gathered(ids, rows)
