"""The columns of ``real_models.py`` for causal language models: loss and KL by domain, and a passkey far back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
