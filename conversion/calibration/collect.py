"""From what a user names as calibration data to samples that the model's sides read, whatever they read."""

from __future__ import annotations

import copy
from typing import Any

import torch

from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.errors import ConversionError

from .gather import gathered, reads_text, writes_itself
from .own_pairs import own_pairs, read_by_encoder
from .pairs import text_pairs
from .samples import IGNORE, Samples
from .sound import sound_samples
from .text import longest, refuse_unknown_ids, tokenizer_of

#: tokens of a sequence at most, where nothing else is asked for
LENGTH, PAIR_LENGTH, ENCODER_LENGTH = 1024, 512, 128
#: tokens that either side of an encoder-decoder reads at most, where that is random ids
OWN_LENGTH = 48


def collected(
    plan: Plan, original: Any, calibrate: str, *, tokens: int, length: int | None, count: int | None,
    device: torch.device,
) -> Samples:  # fmt: skip
    """Calibration samples for a model.

    Args:
        original: the source; a copy of it on ``device`` writes and transcribes.
        calibrate: sources by shares, see :func:`~.gather.parse_sources`.
        tokens: of text, at most; ``length``: of a sequence, what the model's kind likes by default.
        count: recordings at most, for models that hear.

    Raises:
        ConversionError: a source is missing or holds too little.
    """
    if plan.family.reads == "sound":
        return sound_samples(plan, original, calibrate, count=count, length=length, device=device)
    return text_samples(plan, original, calibrate, tokens=tokens, length=length, device=device)


def text_samples(
    plan: Plan, original: Any, calibrate: str, *, tokens: int, length: int | None, device: torch.device
) -> Samples:
    """Samples for a model that reads text: see :func:`collected`."""
    both = bool(plan.config.is_encoder_decoder)
    if both and plan.answers:
        return _own_pairs(plan, original, calibrate, tokens, length, device)
    if both and writes_itself(calibrate):
        raise ConversionError(f"{plan.source.name} has no head, so it cannot write; give --calibrate TEXT")
    tokenizer = tokenizer_of(plan) if reads_text(calibrate) else None
    causal = both or plan.units[0].layer.stack.causal
    ids, about, notes = gathered(
        plan, original, tokenizer, calibrate, tokens=tokens, length=length,
        longest=longest(plan, PAIR_LENGTH if both else LENGTH if causal else ENCODER_LENGTH, length),
        whole=not causal, device=device,
    )  # fmt: skip
    refuse_unknown_ids(plan.source.name, original, ids)
    if not both:
        return Samples([ids], about, notes)
    encoder, decoder, about["pairs"] = text_pairs(ids, tokenizer, plan.config)
    labels = torch.cat([decoder[:, 1:], torch.full_like(decoder[:, :1], IGNORE)], 1)
    return Samples([encoder, decoder], about, notes, labels=labels)


def _own_pairs(
    plan: Plan, original: Any, calibrate: str, tokens: int, length: int | None, device: torch.device
) -> Samples:
    texts = reads_text(calibrate)
    tokenizer = tokenizer_of(plan) if texts else None
    most = longest(plan, ENCODER_LENGTH if texts else OWN_LENGTH, length)
    read, about, notes = read_by_encoder(plan, tokenizer, calibrate, tokens=tokens, length=length, longest=most)
    refuse_unknown_ids(plan.source.name, original, read)
    writer = original if original.device == device else copy.deepcopy(original).to(device)
    samples = own_pairs(plan, writer, read, most if length is None else length, about)
    samples.notes += notes
    return samples
