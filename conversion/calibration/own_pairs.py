"""Calibration samples that an encoder-decoder makes itself, for conversions to which no data is given.

What an encoder is for, nobody can sample from it; what its decoder says of anything, it can. So the encoder reads
random ids, and the decoder's words are drawn. (What the decoder said, read by the encoder again, once or twice, was
measured on flan-t5-small and is worse: benchmarks/results/real_models.md.)

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
    read[:, -1] = end
    said = written(
        model, heard(model, read), torch.full((count, 1), start), length + 1, end=end, seed=plan.seed
    )  # fmt: skip
    ids, kept, labels = ended(said, length, 1, end)
    about = {"source": "own", "seed": plan.seed, "samples": count, "tokens": int(kept.sum()), "pairs": "own answers"}
    return Samples([read, ids], about, [], kept, labels)


@torch.no_grad()
def heard(model: Any, read: Tensor) -> Tensor:
    """The encoder's output [N, S', E] for what it reads (ids, features), on the CPU."""
    encoder = model.get_encoder()
    return torch.cat([encoder(as_read(part.to(model.device), encoder))[0].cpu() for part in read.split(8)])
