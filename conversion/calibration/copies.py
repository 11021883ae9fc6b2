"""Long sequences in which pieces come again: what teaches a converted model to find what it read far back.

Heads that look something up ("induction heads", Olsson et al. 2022, arXiv 2209.11895) are the first thing that merging
loses, and ordinary text of a thousand tokens hardly asks for them: after it, a number of five digits is not found again
300 tokens later. So sequences are put together to longer ones, and in most of them pieces are copied to later places.
The original, which is asked what comes next, knows the copies; so must the converted model.

Shapes: N sequences, S tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: tokens of a sequence: what is found again at 4,096 tokens was learned there
LONGEST = 4096
#: sequences that are left, at least, where there are so many
FEWEST = 16
#: of the sequences have copies
SHARE = 0.75
#: copies in so many tokens, of so many tokens
COPIES, EACH = 4, 1024
SPAN = (6, 48)
#: at least so many tokens are between the end of a piece and its copy
APART = 64


def joined_rows(ids: Tensor, longest: int) -> Tensor:
    """Sequences one behind the other, as many as ``longest`` tokens take, and ``FEWEST`` remain.

    Args:
        ids: [N, S].

    Returns:
        [N // k, k * S], k * S at most ``longest``, k at least 1; what does not fill a row is left out.

    >>> joined_rows(torch.zeros(1600, 1024), 4096).shape, joined_rows(torch.zeros(33, 1024), 4096).shape
    (torch.Size([400, 4096]), torch.Size([16, 2048]))
    """
    k = max(1, min(longest // ids.shape[1], len(ids) // FEWEST))
    return ids[: len(ids) // k * k].reshape(-1, k * ids.shape[1])


def with_copies(ids: Tensor, seed: int) -> Tensor:
    """``ids`` [N, S]; in ``SHARE`` of the rows, drawn by ``seed``, pieces are copied to later places of the row."""
    draw = torch.Generator().manual_seed(seed)
    ids, S = ids.clone(), ids.shape[1]
    chosen = torch.randperm(len(ids), generator=draw)[: round(SHARE * len(ids))]
    for n in chosen.tolist() if S > 2 * SPAN[1] + APART else ():
        for _ in range(COPIES * S // EACH):
            length = _between(*SPAN, draw)
            to = _between(length + APART, S - length, draw)
            start = _between(0, to - length - APART + 1, draw)
            ids[n, to : to + length] = ids[n, start : start + length].clone()
    return ids


def _between(low: int, high: int, draw: torch.Generator) -> int:
    """A number from ``low`` to ``high`` - 1."""
    return int(torch.randint(low, high, (), generator=draw))
