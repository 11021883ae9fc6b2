"""Calibration text for an encoder-decoder: every sequence becomes what its encoder and what its decoder reads.

T5 learned to fill in spans of text that were taken out (arXiv 1910.10683: 15% of the tokens, three at a time), so this
is what its tokenizer's sentinels ``<extra_id_0>``, ... are used for. Other models read the first half of a sequence and
write the second. All pairs have the same lengths, so nothing is padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.documents.positions import start_of
from hf_attn_patch.errors import ConversionError

NOISE, SPAN = 0.15, 3


def text_pairs(ids: Tensor, tokenizer: Any, config: Any, seed: int = 0) -> tuple[Tensor, Tensor, str]:
    """Split calibration text for an encoder-decoder.

    Args:
        ids: [N, L], L at least 4.
        config: names ``decoder_start_token_id`` (or ``bos_token_id``) and ``eos_token_id``.

    Returns:
        what the encoder reads [N, S], what the decoder reads [N, T], and how they were made: "span corruption" or
        "halves".

    Raises:
        ConversionError: the config does not say how a decoder's input begins, or sequences are too short.
    """
    start, end = start_of(config), config.eos_token_id
    if start is None:
        raise ConversionError("config.json names no decoder_start_token_id, so decoders cannot be given text")
    L = ids.shape[1]
    if L < 4:
        raise ConversionError(f"sequences of {L} tokens cannot be split between encoder and decoder; give more text")
    ends = [] if end is None else [end if isinstance(end, int) else end[0]]
    noise = max(1, round(NOISE * L))
    spans = max(1, round(noise / SPAN))
    sentinels = _sentinels(tokenizer, spans)
    if sentinels:
        draw = torch.Generator().manual_seed(seed)
        rows = [_corrupted(row.tolist(), noise, sentinels, draw) for row in ids]
        how = "span corruption"
    else:
        rows = [(row[: L // 2], row[L // 2 :]) for row in ids.tolist()]
        how = "halves"
    return (
        torch.tensor([[*source, *ends] for source, _ in rows]),
        torch.tensor([[start, *target] for _, target in rows]),
        how,
    )


def _sentinels(tokenizer: Any, count: int) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ...; empty if the tokenizer has not as many."""
    found = [tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(count)]
    return [] if any(i is None or i == tokenizer.unk_token_id for i in found) else found


def _corrupted(row: list[int], noise: int, sentinels: list[int], draw: torch.Generator) -> tuple[list[int], list[int]]:
    """Take out ``noise`` tokens in as many spans as there are sentinels: (what is left, what was taken).

    >>> kept, taken = _corrupted(list(range(10)), 3, [90, 91], torch.Generator().manual_seed(0))
    >>> len(kept), len(taken), sorted(t for t in kept + taken if t < 90) == list(range(10))
    (9, 5, True)
    """
    source: list[int] = []
    target: list[int] = []
    position = 0
    plain = _parts(len(row) - noise, len(sentinels), draw)
    for sentinel, keep, take in zip(sentinels, plain, _parts(noise, len(sentinels), draw), strict=True):
        source += [*row[position : position + keep], sentinel]
        target += [sentinel, *row[position + keep : position + keep + take]]
        position += keep + take
    return source, target


def _parts(total: int, count: int, draw: torch.Generator) -> list[int]:
    """``count`` random whole numbers of at least 1 that add up to ``total``."""
    cuts = (torch.randperm(total - 1, generator=draw)[: count - 1] + 1).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
