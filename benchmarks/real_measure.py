"""The columns of ``real_models.py`` for causal language models: loss and KL by domain, and a passkey far back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch import GrowingCache
from hf_attn_patch.compat.cache_keyword import keyword_of
from hf_attn_patch.conversion.calibration.polish import Speaker, losses

#: texts of the table; the last two are never calibrated on
DOMAINS = ("wikitext", "kernel", "postgresql", "handbook")
CONTEXT, WINDOWS = 2048, 24
PASSKEYS, TRIALS = (4096, 8192), 16
#: what stands around the passkey (the task of Mohtashami and Jaggi 2023, arXiv 2305.16300)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def windows(tokenizer: Any, texts: Path, name: str, context: int = CONTEXT, count: int = WINDOWS) -> Tensor:
    """The first whole windows of a domain's held-out text [N, context]."""
    text = (texts / f"{name}.test.txt").read_text()[: 8 * context * count]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = min(count, len(ids) // context)
    return torch.tensor(ids[: whole * context]).view(whole, context)


def by_domain(original: Any, model: Any, domains: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Of each domain the source's loss, the model's, and KL(source || model), in nats a token."""
    speakers = Speaker(original), Speaker(model)
    return {name: losses(*speakers, ids, 4) for name, ids in domains.items()}


#: tokens of a chunk by which :func:`by_caches` reads
CHUNK = 64


@torch.no_grad()
def by_caches(model: Any, domains: dict[str, Tensor], kinds: tuple[str | None, ...]) -> dict[str, dict[str, Any]]:
    """Of each domain and kind of cache the loss in nats a token, and KL(the first kind || it).

    A window is read in chunks of 64 tokens, so that nearly all keys and values that a token attends to come out of the
    cache: all but the first chunk's.

    Args:
        kinds: what ``GrowingCache`` takes as ``dtype``.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, ids in domains.items():
        sums = {str(kind): [0.0, 0.0] for kind in kinds}
        for row in ids.to(model.device).split(1):
            first: Tensor | None = None
            for kind in kinds:
                predicted = _read(model, row, GrowingCache(config=model.config, dtype=kind))
                first = predicted if first is None else first
                sums[str(kind)][0] -= float(predicted.gather(-1, row[:, 1:, None]).mean())
                sums[str(kind)][1] += float((first.exp() * (first - predicted)).sum(-1).mean())
        found[name] = {kind: {"loss": a / len(ids), "kl": b / len(ids)} for kind, (a, b) in sums.items()}
        print(name, {k: (round(v["loss"], 4), round(v["kl"], 5)) for k, v in found[name].items()}, flush=True)
    return found


def _read(model: Any, row: Tensor, cache: Any) -> Tensor:
    """Log-probabilities [1, S - 1, V] of what follows each token."""
    parts = []
    for chunk in row.split(CHUNK, 1):
        logits = model(chunk, **{keyword_of(model.forward): cache}, use_cache=True).logits
        parts.append(logits.float().log_softmax(-1))
    return torch.cat(parts, 1)[:, :-1]


@torch.no_grad()
def passkey(model: Any, tokenizer: Any, length: int, trials: int = TRIALS) -> float:
    """The share of five-digit keys that the model says again after about ``length`` tokens, at depths spread evenly."""
    draw = random.Random(length)
    right = 0
    for trial in range(trials):
        key = str(draw.randrange(10_000, 100_000))
        said = f"The pass key is {key}. Remember it. {key} is the pass key. "
        ends = tokenizer(said + "\nWhat is the pass key? The pass key is", add_special_tokens=False)["input_ids"]
        filler = tokenizer(FILLER, add_special_tokens=False)["input_ids"]
        repeats = (length - len(ends) - 16) // len(filler)
        before = round(repeats * (trial + 0.5) / trials)
        text = FILLER * before + said + FILLER * (repeats - before) + "\nWhat is the pass key? The pass key is"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(f" {key}", add_special_tokens=False)["input_ids"]
        row = torch.tensor([ids + answer], device=model.device)
        logits = model(input_ids=row, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
        right += bool((logits.argmax(-1) == row[0, -len(answer) :]).all())
    return right / trials
