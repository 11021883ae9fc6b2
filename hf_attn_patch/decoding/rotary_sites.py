"""Rotary embeddings of queries and keys on a tape, and the new keys and values that go into the cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hf_attn_patch.attn.kernels import small

from .sites import Reader, Site, is_slot
from .tape import Op

aten = torch.ops.aten


@dataclass
class Turn:
    """One rotary embedding, ``x * cos + rotate_half(x) * sin``."""

    x: int
    cos: int
    sin: int
    out: int
    inside: set[int]


@dataclass
class Append:
    """One token's keys or values written to a buffer."""

    buffer: int
    index: int
    new: int
    at: int


def rotaries(tape: Reader) -> Iterator[Site]:
    """Queries and keys that are turned by the same angles, with the cache's new token where it follows."""
    turns = [t for i, op in enumerate(tape.tape.ops) if (t := _turn(tape, i, op)) is not None]
    appends = _appends(tape)
    of_keys = {k.new: (k, v) for k, v in appends}
    used: set[int] = set()
    pairs = itertools.pairwise(turns)
    for q, k in pairs:
        same = (q.cos, q.sin) == (k.cos, k.sin) and tape.values[q.x].shape[0] == tape.values[k.x].shape[0]
        if not same or q.out in used or tape.values[q.x].shape[-1] != tape.values[k.x].shape[-1]:
            continue
        used |= {q.out, k.out}
        if k.out in of_keys and len(tape.read_by[k.out]) == 1:
            keys, values = of_keys.pop(k.out)
            yield _turned_and_appended(tape, q, k, keys, values)
        else:
            yield _turned(tape, q, k)
    for keys, values in of_keys.values():
        yield _appended(tape, keys, values)


def _turned(tape: Reader, q: Turn, k: Turn) -> Site:
    like_q, like_k = tape.like(q.out), tape.like(k.out)

    def run(q: Any, k: Any, cos: Any, sin: Any) -> list[Any]:
        return small.rotate(q, k, cos, sin, like_q, like_k)

    return Site("rotary embeddings", q.inside | k.inside, [q.x, k.x, q.cos, q.sin], [q.out, k.out], run)


def _turned_and_appended(tape: Reader, q: Turn, k: Turn, keys: Append, values: Append) -> Site:
    like_q = tape.like(q.out)

    def run(q: Any, k: Any, v: Any, cos: Any, sin: Any, keys: Any, values: Any, index: Any) -> list[Any]:
        return small.rotate_and_append(q, k, v, cos, sin, keys, values, index, like_q)

    run.writes = True  # type: ignore[attr-defined]

    def trial(q: Any, k: Any, v: Any, cos: Any, sin: Any, *memory: Any) -> list[Any]:
        buffers = torch.empty_like(k), torch.empty_like(v)
        first = torch.zeros(1, dtype=torch.int64, device=k.device)
        return [*small.rotate_and_append(q, k, v, cos, sin, *buffers, first, like_q), *buffers]

    inputs = [q.x, k.x, values.new, q.cos, q.sin, keys.buffer, values.buffer, keys.index]
    inside = q.inside | k.inside | {keys.at, values.at}
    kind = "rotary embeddings with the cache's new token"
    return Site(kind, inside, inputs, [q.out], run, trial, [q.out, k.out, values.new])


def _appended(tape: Reader, keys: Append, values: Append) -> Site:
    def trial(keys: Any, values: Any, index: Any, k: Any, v: Any) -> list[Any]:
        buffers = torch.empty_like(k), torch.empty_like(v)
        small.append(*buffers, torch.zeros(1, dtype=torch.int64, device=k.device), k, v)
        return [*buffers]

    inputs = [keys.buffer, values.buffer, keys.index, keys.new, values.new]
    tried = [keys.new, values.new]
    return Site("the cache's new token", {keys.at, values.at}, inputs, [], small.append, trial, tried)


def _turn(tape: Reader, at: int, op: Op) -> Turn | None:
    if op.run is not aten.add.Tensor or op.kwargs or len(op.args) != 2:
        return None
    plain, turned = (tape.maker(a, aten.mul.Tensor) for a in op.args)
    if plain is None or turned is None:
        return None
    half = _half_turned(tape, turned[1].args[0])
    if half is None:
        return None
    x, inside = half
    if plain[1].args[0] != x or not is_slot(plain[1].args[1]) or not is_slot(turned[1].args[1]):
        return None
    cos, sin, out = plain[1].args[1], turned[1].args[1], op.outputs[0]
    t = tape.values[x]
    if t.dim() != 4 or t.shape[2] != 1 or t.shape[-1] % 2 or not tape.rows(x, cos, sin, out):
        return None
    for turn in (tape.values[cos], tape.values[sin]):
        if turn.shape not in ((1, 1, 1, t.shape[-1]), (t.shape[0], 1, 1, t.shape[-1])) or turn.dtype != t.dtype:
            return None
    if not tape.steady(x, cos, sin, out):
        return None
    return Turn(x, cos, sin, out, {at, plain[0], turned[0], *inside})


def _half_turned(tape: Reader, slot: Any) -> tuple[int, set[int]] | None:
    """(x, operators) of ``cat([-x[..., D / 2:], x[..., :D / 2]], -1)``."""
    cat = tape.maker(slot, aten.cat.default)
    if cat is None or len(cat[1].args) != 2 or cat[1].args[1] not in (-1, 3) or len(cat[1].args[0]) != 2:
        return None
    negated, low = tape.maker(cat[1].args[0][0], aten.neg.default), tape.maker(cat[1].args[0][1], aten.slice.Tensor)
    high = None if negated is None else tape.maker(negated[1].args[0], aten.slice.Tensor)
    if negated is None or low is None or high is None:
        return None
    x = low[1].args[0]
    D = tape.values[x].shape[-1]
    ends = [(op.args[1], op.args[2], min(op.args[3], D)) for op in (low[1], high[1]) if len(op.args) == 4]
    last = tape.values[x].dim() - 1
    if high[1].args[0] != x or [(d % (last + 1), a, b) for d, a, b in ends] != [(last, 0, D // 2), (last, D // 2, D)]:
        return None
    return x, {cat[0], negated[0], low[0], high[0]}


def _appends(tape: Reader) -> list[tuple[Append, Append]]:
    """Keys and values that are written to the cache one after the other."""
    found = []
    for i, op in enumerate(tape.tape.ops):
        if op.run is not aten.index_copy_.default:
            continue
        buffer, dim, index, new = op.args
        t, b = tape.values[new], tape.values[buffer]
        fits = t.dim() == 4 and dim == 2 and t.shape[2] == 1 and t.dtype == b.dtype and b.shape[:2] == t.shape[:2]
        if fits and tape.rows(new, buffer) and tape.steady(new) and buffer in tape.tape.given and t.dtype.itemsize > 1:
            found.append(Append(buffer, index, new, i))
    pairs = []
    while len(found) > 1:
        keys, values = found[0], found[1]
        together = values.at == keys.at + 1 and keys.index == values.index and keys.buffer != values.buffer
        same = tape.values[keys.new].shape[:2] == tape.values[values.new].shape[:2]
        if together and same:
            pairs.append((keys, values))
        del found[: 2 if together and same else 1]
    return pairs
