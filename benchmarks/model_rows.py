"""The rows of ``models.py``: how much work of which kind, who does it, and on which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure import DEVICE

OURS = "hf_attn_patch"


@dataclass(frozen=True)
class Row:
    """One line of work; ``form``: "full", "padded" or "packed"."""

    kind: str
    B: int
    S: int
    form: str
    kv_heads: tuple[int, ...] = (8,)

    @property
    def name(self) -> str:
        form = "" if self.form == "full" else f", {self.form}"
        return f"{self.kind}{form}, B{self.B} S{self.S}"


ROWS = (
    Row("decode", 16, 8192, "padded", (8, 32, 1)),
    Row("decode", 16, 8192, "full", (8, 32, 1)),
    Row("decode", 1, 65536, "full", (8, 32, 1)),
    Row("decode", 1, 512, "full", (8, 32, 1)),
    Row("prefill", 8, 4096, "padded", (8, 32)),
    Row("train", 8, 2048, "full", (8, 32)),
    Row("train", 8, 2048, "padded", (8, 32)),
    Row("train", 1, 16384, "packed", (8, 32)),
)


@dataclass(frozen=True)
class Variant:
    """An implementation and what of this package is used with it."""

    attention: str
    growing: bool = False
    graphs: bool = False
    unpadded: bool = False
    static: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        extras = (
            " + GrowingCache" * self.growing,
            ", graphs" * self.graphs,
            " + StaticCache" * self.static,
            ", compiled" * self.compiled,
            " + unpadded" * self.unpadded,
        )
        return self.attention + "".join(extras)


def variants(row: Row, peers: tuple[str, ...], static: bool) -> list[Variant]:
    theirs, ours = [Variant(name) for name in peers], [Variant(OURS)]
    if row.kind == "decode":
        ours += [Variant(OURS, growing=True), Variant(OURS, growing=True, graphs=True)]
        if DEVICE == "cuda":
            ours.append(Variant(OURS, growing=True, graphs=True, compiled=True))
        if static:  # as generate(cache_implementation="static") runs it on a GPU
            ours.append(Variant(OURS, static=True, compiled=True))
            theirs += [Variant("sdpa", static=True, compiled=True)] * ("sdpa" in peers)
    elif row.form == "padded":
        ours.append(Variant(OURS, unpadded=True))
    return theirs + ours


class Inputs:
    """The tokens of one row: lengths between S/8 and S where padded, documents of S/64 to S/4 where packed."""

    def __init__(self, row: Row, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(7)
        B, S = row.B, row.S
        self.ids = torch.randint(3, vocabulary, (B, S), generator=generator).to(DEVICE)
        self.lengths = [S] * B
        if row.form == "padded":
            self.lengths = torch.randint(S // 8, S + 1, (B,), generator=generator).tolist()
            self.lengths[0] = S
        elif row.form == "packed":
            self.lengths = []
            while sum(self.lengths) < S:
                length = int(torch.randint(max(1, S // 64), S // 4 + 1, (1,), generator=generator))
                self.lengths.append(min(length, S - sum(self.lengths)))
        self.tokens = sum(self.lengths)
        lengths = torch.tensor(self.lengths, device=DEVICE)
        columns = torch.arange(S, device=DEVICE)
        if row.form == "packed":
            self.mask = None
            self.positions = torch.cat([torch.arange(n, device=DEVICE) for n in self.lengths])[None]
            borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            longest = max(self.lengths)
            self.extra: dict[str, Any] = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
            self.extra |= {"max_length_q": longest, "max_length_k": longest}
        else:
            left = row.kind != "train"  # generation pads on the left, training on the right
            real = columns >= S - lengths[:, None] if left else columns < lengths[:, None]
            self.mask = real.long()
            self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
            self.extra = {}
        self.labels = self.ids if self.mask is None else self.ids.where(self.mask == 1, -100)
        if self.mask is None:  # a document's first token is nobody's target
            self.labels = self.ids.index_fill(1, self.extra["cu_seq_lens_q"][:-1].long(), -100)
