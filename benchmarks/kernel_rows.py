"""The rows of ``kernels.py``: what is computed, on which inputs, and the truth that every kernel is held to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from benchmarks.measure import DEVICE
from hf_attn_patch.attn.codes import KINDS, pack_both, unpack
from hf_attn_patch.attn.kernels.decode_reference import grouped_decode_reference

Tensor = torch.Tensor


@dataclass(frozen=True)
class Row:
    """One line of a table. Keys that a query may not see are those after it (``causal``, aligned at the end)."""

    section: str
    B: int
    Sq: int
    Sk: int
    HQ: int
    HKV: int
    D: int
    causal: bool = True
    backward: bool = False
    pad: str = ""  # "left", "right": rows of different lengths
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False
    page: int = 0  # K and V in pages of so many keys
    documents: int = 0  # packed into one row
    codes: str = ""  # "int8", "fp8": what our kernel reads; the others read the same numbers, unpacked

    @property
    def decode(self) -> bool:
        return self.Sq <= 16

    @property
    def name(self) -> str:
        length = f"{self.Sk}" if self.Sq in (1, self.Sk) else f"{self.Sq} x {self.Sk}"
        parts = [f"{self.B}, {length}, {self.HQ}/{self.HKV}, {self.D}"]
        if not self.decode:
            parts.append("causal" if self.causal else "full")
        if self.backward and self.section != "training":
            parts.append("training")
        parts += [f"{self.pad} padded"] if self.pad else []
        parts += [f"{n} {x:g}" for n, x in (("window", self.window), ("softcap", self.softcap)) if x]
        parts += ["sinks"] * self.sinks + ["T5 bias"] * self.bias
        parts += [f"pages of {self.page}"] if self.page else []
        parts += [f"{self.documents} documents"] if self.documents else []
        parts += [self.codes] if self.codes else []
        return " ".join(parts)

    def tiny(self) -> Row:
        """The same kind of work, small enough for a CPU."""
        HKV, Sk = min(self.HKV, 2), min(self.Sk, 96)
        Sq = Sk if self.Sq == self.Sk else min(self.Sq, 4)
        group = min(self.HQ // self.HKV, 2)
        window = None if self.window is None else 20
        page = min(self.page, 16)
        return replace(self, B=min(self.B, 2), Sq=Sq, Sk=Sk, HQ=HKV * group, HKV=HKV, D=32, window=window, page=page)


def rows() -> list[Row]:
    """All of them, by section."""
    out = []
    shapes = [(8, 2048, 32, 8, 128, True), (1, 16384, 32, 8, 128, True), (1, 16384, 32, 8, 128, False)]
    shapes += [(1, 16384, 32, 32, 128, True), (8, 2048, 32, 8, 64, True), (1, 16384, 32, 8, 64, True)]
    for backward in (False, True):
        for B, S, HQ, HKV, D, causal in shapes:
            out.append(Row("training" if backward else "prefill", B, S, S, HQ, HKV, D, causal, backward))
    for D in (64, 128):  # T5's encoder; the bias has its gradient
        out.append(Row("training", 8, 1024, 1024, 12, 12, D, causal=False, backward=True, bias=True))
    for backward in (False, True):
        out.append(Row("packed", 1, 16384, 16384, 32, 8, 128, True, backward, documents=24))
    caches = [(1, 8192, 32, 32, 128), (1, 8192, 32, 8, 128), (1, 131072, 32, 8, 128), (16, 8192, 32, 32, 128)]
    caches += [(16, 8192, 32, 8, 128), (16, 8192, 32, 1, 128), (64, 8192, 32, 8, 128), (8, 8760, 12, 3, 64)]
    caches += [(1, 512, 32, 8, 128), (1, 2048, 32, 8, 128)]
    for B, S, HQ, HKV, D in caches:
        out += [Row("decode", B, 1, S, HQ, HKV, D, pad=pad) for pad in ("", "left", "right") if B > 1 or not pad]
    prefill = Row("options", 1, 16384, 16384, 32, 8, 128)
    decode = Row("options", 16, 1, 8192, 32, 8, 128)
    gemma: dict[str, Any] = {"HQ": 8, "HKV": 4, "D": 256}
    gpt_oss: dict[str, Any] = {"HQ": 64, "HKV": 8, "D": 64}
    t5: dict[str, Any] = {"HQ": 12, "HKV": 12, "D": 64}
    out += [
        replace(prefill, **gemma),
        replace(decode, **gemma),
        replace(prefill, window=4096),
        replace(decode, B=4, Sk=32768, window=4096),
        replace(prefill, Sq=8192, Sk=8192, **gemma, softcap=50.0),
        replace(decode, **gemma, softcap=50.0),
        replace(prefill, **gpt_oss, sinks=True, window=128),
        replace(decode, **gpt_oss, sinks=True),
        replace(prefill, B=8, Sq=1024, Sk=1024, **t5, bias=True, causal=False),
        replace(decode, Sk=1024, **t5, bias=True),
        replace(decode, Sq=4),
        replace(decode, Sq=16),
    ]
    out += [Row("paged", 16, 1, 8192, 32, 8, 128, pad="right", page=page) for page in (16, 256)]
    for B, S in ((16, 32768), (16, 8192), (64, 8192), (1, 131072), (1, 8192)):
        out += [Row("codes", B, 1, S, 32, 8, 128, codes=kind) for kind in KINDS]
    return out


class Inputs:
    """Random tensors of a row, in as many sets as keep the L2 cache cold while decoding."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
        generator = torch.Generator(DEVICE).manual_seed(7)
        B, S = row.B, row.Sk

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE, dtype=self.dtype)

        def heads(h: int, s: int) -> Tensor:  # [B, H, S, D]; as a projection leaves it, or as a cache does
            return randn(B, h, s, row.D) if row.decode else randn(B, s, h, row.D).transpose(1, 2)

        self.first = self.end = self.valid = None
        lengths = torch.full((B,), S)
        if row.pad:
            lengths = torch.randint(S // 8, S + 1, (B,), generator=torch.Generator().manual_seed(7))
            first = S - lengths if row.pad == "left" else torch.zeros(B, dtype=torch.long)
            self.first, self.end = (t.to(DEVICE, torch.int32) for t in (first, first + lengths))
            keys = torch.arange(S, device=DEVICE)
            self.valid = ((keys >= self.first[:, None]) & (keys < self.end[:, None]))[:, None, None, :]
        self.lengths = lengths
        bytes_a_set = 2 * B * row.HKV * S * row.D * self.dtype.itemsize
        sets = max(1, min(16, -(-(512 << 20) // bytes_a_set))) if row.decode and DEVICE == "cuda" else 1
        self.q = heads(row.HQ, row.Sq).requires_grad_(row.backward)
        self.kv = [tuple(heads(row.HKV, S).requires_grad_(row.backward) for _ in "kv") for _ in range(sets)]
        if row.codes:
            kind = KINDS[row.codes]
            self.packed = [pack_both(k, v, kind) for k, v in self.kv]
            self.kv = [(unpack(*k, kind.keys, self.dtype), unpack(*v, kind.values, self.dtype)) for k, v in self.packed]
        self.grad = heads(row.HQ, row.Sq) if row.backward else None
        self.sinks = randn(row.HQ) if row.sinks else None
        self.bias = randn(1, row.HQ, row.Sq, S).requires_grad_(row.backward) if row.bias else None
        self.borders = None
        if row.documents:
            cuts = torch.randperm(S - 1, generator=torch.Generator().manual_seed(3))[: row.documents - 1] + 1
            borders = torch.cat([torch.zeros(1), cuts.sort().values, torch.full((1,), S)])
            self.borders = borders.to(DEVICE, torch.int32)
            self.longest = int(borders.diff().max())
        if row.page:
            self._page()

    def _page(self) -> None:
        B, page, S = self.row.B, self.row.page, self.row.Sk
        most = -(-S // page)
        table = torch.randperm(B * most, generator=torch.Generator().manual_seed(1)).view(B, most).to(DEVICE)
        self.table = table.int()
        self.pages = []
        for pair in self.kv:
            k_pages, v_pages = (torch.empty(B * most, page, self.row.HKV, self.row.D).to(t) for t in pair)
            for pages, t in zip((k_pages, v_pages), pair, strict=True):
                cut = t.transpose(1, 2).reshape(B, most, page, self.row.HKV, self.row.D)
                pages[table.flatten()] = cut.flatten(0, 1)
            self.pages.append((k_pages, v_pages))

    @cached_property
    def mask(self) -> Tensor | None:
        """Bool [B or 1, 1, Sq or 1, Sk] of all that hides keys, for those who take nothing better."""
        row = self.row
        i = torch.arange(row.Sq, device=DEVICE)[:, None] + row.Sk - row.Sq
        j = torch.arange(row.Sk, device=DEVICE)[None]
        mask = self.valid
        if row.causal and row.Sq > 1:
            mask = j <= i
        if row.window is not None:
            mask = (j > i - row.window) if mask is None else mask & (j > i - row.window)
        if self.borders is not None:
            document = torch.searchsorted(self.borders, torch.arange(row.Sk, device=DEVICE), right=True)
            same = document[:, None] == document[None]
            mask = same if mask is None else mask & same
        return mask if mask is None or mask.dim() == 4 else mask[None, None]

    def pairs(self) -> int:
        """Query-key pairs of one head, over the batch; of a decoding row each query counts the last one's keys."""
        row = self.row
        if self.mask is None or row.decode:
            seen = torch.clamp(self.lengths, max=row.window or row.Sk)
            return int(seen.sum()) * row.Sq
        return int(self.mask.sum()) * (row.B // self.mask.shape[0])

    def work(self) -> tuple[str, float]:
        """("FLOP" or "byte", how many)."""
        row = self.row
        if row.decode:
            each = row.D + 4 if row.codes else row.D * self.dtype.itemsize  # codes, and a scale in fp32
            return "byte", 2.0 * self.pairs() / row.Sq * row.HKV * each
        return "FLOP", 4.0 * self.pairs() * row.HQ * row.D * (3.5 if row.backward else 1)

    def part(self, *results: Tensor) -> list[Tensor]:
        """Of [B, H, ...] results (the output, then the gradients of q, k, v and bias), what :meth:`truth` has."""
        G = self.row.HQ // self.row.HKV
        B = self.row.B if self.row.decode or self.bias is not None else 1  # rows share a bias
        return [t.detach()[:B, : (1 if i in (2, 3) else G)] for i, t in enumerate(results)]

    def truth(self, dtype: torch.dtype) -> list[Tensor]:
        """Output (and gradients) of the first KV head and its group, of the first row (decoding, bias: of all rows)."""
        row = self.row
        _, q, k, v = self.part(self.q, self.q, *self.kv[0])
        q, k, v = (t.to(dtype).requires_grad_(row.backward) for t in (q, k, v))
        G = row.HQ // row.HKV
        options: dict[str, Any] = {"softcap": row.softcap, "causal": row.causal, "window": row.window}
        if self.borders is not None:
            options = {"mask": self.mask, "causal": False}
        if self.sinks is not None:
            options["sinks"] = self.sinks[:G]
        if self.bias is not None:
            options["bias"] = bias = self.bias.detach()[:, :G].to(dtype).requires_grad_(row.backward)
        out, _ = grouped_decode_reference(q, k, v, scale=row.D**-0.5, first=self.first, end=self.end, **options)
        if self.grad is None:
            return [out]
        wanted = (q, k, v) if self.bias is None else (q, k, v, bias)
        return [out.detach(), *torch.autograd.grad(out, wanted, self.grad[: q.shape[0], :G].to(dtype))]
