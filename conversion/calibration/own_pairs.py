"""Calibration samples that an encoder-decoder makes itself, for conversions to which no data is given.

What an encoder is for, nobody can sample from it; what its decoder says of anything, it can. So the encoder first reads
random ids, then, for most of the samples, what the decoder said of those, and the decoder's words are drawn again.

Shapes: N samples, S tokens that the encoder reads, T that the decoder does, E model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.errors import ConversionError

from .layers import as_read
from .samples import Samples, ended
from .written_pairs import written

#: times that the decoder's words are given back to the encoder
ROUNDS = 2


def own_pairs(plan: Plan, model: Any, count: int, length: int) -> Samples:
    """Let an encoder-decoder of text make its own samples.

    Args:
        model: the original, on the device where it runs.
        count: N.
        length: S, and T at most.

    Raises:
        ConversionError: the config does not say how a decoder begins, or the model cannot run.
    """
    config = plan.config
    start, end = config.decoder_start_token_id, config.eos_token_id
    if start is None:
        raise ConversionError("config.json names no decoder_start_token_id, so its decoder cannot write")
    end = start if end is None else end if isinstance(end, int) else end[0]
    draw = torch.Generator().manual_seed(plan.seed)
    read = torch.randint(0, int(config.vocab_size), (count, length), generator=draw)
    for number in range(ROUNDS + 1):
        said = answers(model, read, length, start=start, end=end, seed=plan.seed + number)
        if number < ROUNDS:
            read = joined_rows(said, length, end, draw)
    ids, kept, labels = ended(said, length, 1, end)
    about = {"source": "own", "seed": plan.seed, "samples": count, "tokens": int(kept.sum()), "pairs": "own answers"}
    return Samples([read, ids], about, [], kept, labels)


def answers(model: Any, read: Tensor, length: int, *, start: int, end: int, seed: int) -> list[list[int]]:
    """What a decoder says of ``read`` [N, S], each from ``start`` to ``end``, at most ``length`` tokens and one."""
    memory = heard(model, read)
    prefix = torch.full((len(read), 1), start)
    return written(model, memory, prefix, length + 1, end=end, seed=seed)


@torch.no_grad()
def heard(model: Any, read: Tensor) -> Tensor:
    """The encoder's output [N, S', E] for what it reads (ids, features), on the CPU."""
    encoder = model.get_encoder()
    return torch.cat([encoder(as_read(part.to(model.device), encoder))[0].cpu() for part in read.split(8)])


def joined_rows(said: list[list[int]], length: int, end: int, draw: torch.Generator) -> Tensor:
    """What was said, one after the other in an order that is drawn, in rows of ``length`` that end as texts do.

    >>> rows = joined_rows([[0, 5, 6, 1], [0, 7, 1], [0, 8, 9, 1]], 4, 1, torch.Generator().manual_seed(0))
    >>> rows.shape, set(rows[:, -1].tolist())
    (torch.Size([3, 4]), {1})
    """
    order = torch.randperm(len(said), generator=draw).tolist()
    stream = [word for i in order for word in said[i][1:] if word != end] or [end]
    wanted = len(said) * (length - 1)
    stream = (stream * (wanted // len(stream) + 1))[:wanted]
    rows = torch.tensor(stream).view(len(said), length - 1)
    return torch.cat([rows, torch.full((len(said), 1), end)], 1)
