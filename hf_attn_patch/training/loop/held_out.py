"""Loss on held-out text, over all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.training.data.steps import share_of


@torch.no_grad()
def evaluate(
    accelerator: Any,
    model: Any,
    examples: list[Any],
    collate: Callable[[list[Any]], Any],
    teacher: Any = None,
    micro_batch_size: int = 1,
) -> dict[str, float]:
    """Means per token with a label: ``loss`` (cross-entropy in nats), ``perplexity``, and with a teacher ``kl``.

    Every process runs as many forwards as every other (a sharded model needs them all); where a process has no
    batch left it repeats the first one and does not count it.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    batches = [examples[i : i + micro_batch_size] for i in range(0, len(examples), micro_batch_size)]
    own = share_of(batches, accelerator.process_index, accelerator.num_processes)
    for some in progress_bar(own, desc="evaluating", unit="batch", shown=accelerator.is_main_process, leave=False):
        batch = collate(some or batches[0]).to(accelerator.device)
        part = model(batch, told=None if teacher is None else teacher(batch))
        if some is not None:
            sums += torch.stack([part.ce, part.kl, part.labels]).double()
    ce, kl, count = accelerator.reduce(sums).tolist()
    model.train(training)
    found = {"loss": ce / count, "perplexity": math.exp(min(ce / count, 700.0)), "scored": count}
    return found if teacher is None else {**found, "kl": kl / count}


def trained_value(found: Mapping[str, float], ce: float, kl: float) -> float:
    """What training makes small, of held-out text: the weighted sum of its losses.

    An encoder's ``loss``, which has no weights, is what it is trained on.

    >>> trained_value({"loss": 2.0, "kl": 0.5}, ce=0.0, kl=1.0), trained_value({"loss": 2.0, "text_distance": 1}, 0, 1)
    (0.5, 2.0)
    """
    if "text_distance" in found:
        return found["loss"]
    return ce * found["loss"] + kl * found.get("kl", 0.0)
