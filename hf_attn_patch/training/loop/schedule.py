"""Learning rates and budgets, counted in tokens: a run looks the same whatever its batch size."""

from __future__ import annotations

import argparse
import math
import re
from typing import Literal

from hf_attn_patch.errors import TrainingError

Decay = Literal["cosine", "linear", "wsd", "constant"]

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


class CountError(TrainingError, argparse.ArgumentTypeError):
    """A TrainingError that argparse passes on in its own words."""


class Count(int):
    """A whole number that may be written with k, M, B (or G) or T.

    >>> Count("50M"), Count("1.5B"), Count("2e3"), Count(7)
    (50000000, 1500000000, 2000, 7)

    Raises:
        CountError: the text is not such a number.
    """

    def __new__(cls, value: str | int | float) -> Count:
        if isinstance(value, str):
            match = re.fullmatch(r"([0-9_.]+(?:e\+?[0-9]+)?)\s*([kmbgt]?)", value.strip().lower())
            try:
                value = round(float(match[1].replace("_", "")) * _SUFFIX[match[2]]) if match else int(value)
            except (ValueError, OverflowError):
                raise CountError(f"{value!r} is not a number of tokens; write 50M, 1.5B or 1000000") from None
        return super().__new__(cls, value)


def learning_rate(
    tokens: int, *, total: int, peak: float, warmup: float = 0.02, decay: Decay = "cosine", floor: float = 0.0
) -> float:
    """The learning rate of a step that starts after ``tokens`` of ``total`` tokens.

    Linear re-warm-up, then decay to ``floor * peak``: what continued pretraining asks for (Ibrahim et al. 2024,
    arXiv 2403.08763). ``wsd`` stays at the peak and falls linearly over the last fifth (Hu et al. 2024,
    arXiv 2404.06395).

    >>> [round(learning_rate(t, total=100, peak=1.0, warmup=0.1, decay="linear"), 2) for t in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]

    Args:
        warmup: the share of ``total`` over which the rate rises from 0.
        floor: the share of ``peak`` that is left at the end.
    """
    rising = warmup * total
    if tokens < rising:
        return peak * tokens / rising
    done = min(1.0, (tokens - rising) / max(1.0, total - rising))
    if decay == "constant":
        share = 1.0
    elif decay == "linear":
        share = 1.0 - done
    elif decay == "wsd":
        share = min(1.0, (1.0 - done) / 0.2)
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (floor + (1.0 - floor) * share)


def token_budget(tokens: int | None, alpha: float | None, pretraining_tokens: int | None) -> int:
    """How many tokens to train on: given as such, or as a share alpha of pretraining (arXiv 2305.13245).

    >>> token_budget(None, 0.05, Count("1T"))
    50000000000

    Raises:
        TrainingError: neither or both were given, or nothing would be trained.
    """
    if (tokens is None) == (alpha is None):
        raise TrainingError("say how much to train: either --tokens 50M, or --alpha 0.05 with --pretraining-tokens 1T")
    if tokens is None:
        if pretraining_tokens is None:
            raise TrainingError("--alpha is a share of the pretraining tokens: give --pretraining-tokens too")
        tokens = round((alpha or 0.0) * pretraining_tokens)
    if tokens <= 0:
        raise TrainingError("the budget is 0 tokens; nothing would be trained")
    return tokens
