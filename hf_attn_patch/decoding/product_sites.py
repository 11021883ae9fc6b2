"""Products of a few rows with weights on a tape: those of the same rows in one kernel, a gated activation with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.attn.kernels import few_rows, matvec
from hf_attn_patch.attn.kernels.decode_plan import overlaps
from hf_attn_patch.compat.torch import unsafe_view_op

from .sites import ACTIVATIONS, Reader, Site, activation, is_slot, near, other_factor
from .tape import Op

aten = torch.ops.aten
_SEEN = 256  # outputs of a product that are compared with fp64
LEAST = 1 << 18  # elements of a weight: smaller ones are not worth a kernel of their own
MOST = 1 << 28  # and of the largest, such as output heads, cuBLAS makes the most already


@dataclass
class Product:
    """``x @ W.T (+ bias)`` of a few rows."""

    at: int
    x: int
    weight: int
    bias: int | None
    out: int


def products(tape: Reader) -> Iterator[Site]:
    """Gated pairs first, then all of the same rows. On Hopper and newer alone, where they were measured."""
    if not _measured(tape):
        return
    found = [p for i, op in enumerate(tape.tape.ops) if (p := _product(tape, i, op)) is not None]
    by_out = {p.out: p for p in found}
    gated: set[int] = set()
    for i, op in enumerate(tape.tape.ops):
        if op.run in ACTIVATIONS and (site := _gated(tape, by_out, i, op)) is not None:
            gated |= site.inside
            yield site
    together: dict[Any, list[Product]] = {}
    for p in found:
        if p.at not in gated:
            t = tape.values[p.x]
            together.setdefault((t.data_ptr(), t.shape, p.bias is None), []).append(p)
    for same in together.values():
        for start in range(0, len(same), matvec.MOST):
            some = same[start : start + matvec.MOST]
            alone = tape.values[some[0].x].shape[0] == 1
            if alone or few_rows.beats_cublas([tape.values[p.weight] for p in some]):
                yield _together(tape, some)


def _measured(tape: Reader) -> bool:
    device = tape.values[0].device
    return device.type == "cpu" or overlaps(device)


def _product(tape: Reader, at: int, op: Op) -> Product | None:
    if op.run is aten.mm.default and not op.kwargs:
        x, turned, bias = op.args[0], op.args[1], None
    elif op.run is aten.addmm.default and not op.kwargs:
        bias, x, turned = op.args
    else:
        return None
    found = tape.maker(turned, aten.t.default)
    if found is None or not is_slot(found[1].args[0]):
        return None
    weight, out = found[1].args[0], op.outputs[0]
    w, v = tape.values[weight], tape.values[x]
    fits = w.is_contiguous() and v.is_contiguous() and v.dtype == w.dtype
    fits = fits and (v.shape[0] == 1 or (v.shape[0] <= few_rows.ROWS and w.dtype.itemsize == 2))
    if not fits or weight not in tape.tape.given or not LEAST <= w.numel() <= MOST or not tape.rows(x, weight):
        return None
    if bias is not None and (bias not in tape.tape.given or tape.values[bias].shape != w.shape[:1]):
        return None
    return Product(at, x, weight, bias, out) if tape.steady(x, weight, out) else None


def _flat(tape: Reader, slot: Any, by_out: dict[int, Product]) -> tuple[Product, int] | None:
    """The product behind a view that is read by nobody else, and the view's number."""
    view = tape.maker(slot, unsafe_view_op, aten.view.default)
    if view is None or (product := by_out.get(view[1].args[0])) is None or len(tape.read_by[product.out]) != 1:
        return None
    return product, view[0]


def _gated(tape: Reader, by_out: dict[int, Product], at: int, op: Op) -> Site | None:
    times = tape.reader(op.outputs[0], aten.mul.Tensor)
    if times is None:
        return None
    gate, other = _flat(tape, op.args[0], by_out), other_factor(times[1], op.outputs[0])
    up = _flat(tape, other, by_out) if is_slot(other) else None
    if gate is None or up is None or len(tape.read_by[op.args[0]]) != 1 or len(tape.read_by[other]) != 1:
        return None
    (g, g_view), (u, u_view), act = gate, up, activation(op)
    pair = tape.values[g.weight], tape.values[u.weight]
    if pair[0].shape != pair[1].shape or tape.values[g.x].data_ptr() != tape.values[u.x].data_ptr():
        return None
    if (g.bias is None) != (u.bias is None):
        return None
    out = times[1].outputs[0]
    shape = tape.values[out].shape
    biases = [b for b in (g.bias, u.bias) if b is not None]

    def run(x: Any, gate: Any, up: Any, *biases: Any) -> list[Any]:
        return [_multiply(x, (gate, up), biases or (None, None), act)[0].view(shape)]

    def judge(found: list[Tensor]) -> Tensor:
        some = _some(pair[0])
        exact = [_exact(tape, p, some).to(tape.values[g.out].dtype).double() for p in (g, u)]
        exact_out = tape.tape.ops[at].run(exact[0], **op.kwargs) * exact[1]
        rows = (-1, shape[-1])
        return near(found[0].view(rows)[:, some], tape.values[out].view(rows)[:, some], exact_out)

    inputs = [g.x, g.weight, u.weight, *biases]
    inside = {g.at, g_view, u.at, u_view, at, times[0]}
    return Site("gated products", inside, inputs, [out], run, judge=judge)


def _together(tape: Reader, some: list[Product]) -> Site:
    n, biased = len(some), some[0].bias is not None

    def run(x: Any, *given: Any) -> list[Any]:
        return _multiply(x, given[:n], given[n:] if biased else (None,) * n, None)

    def judge(found: list[Tensor]) -> Tensor:
        fine = []
        for p, value in zip(some, found, strict=True):
            seen = _some(tape.values[p.weight])
            fine.append(near(value[:, seen], tape.values[p.out][:, seen], _exact(tape, p, seen)))
        return torch.stack(fine).all()

    biases = [p.bias for p in some if p.bias is not None]
    inputs, outputs = [some[0].x, *(p.weight for p in some), *biases], [p.out for p in some]
    kind = "products" if n == 1 else "products of the same rows together"
    return Site(kind, {p.at for p in some}, inputs, outputs, run, judge=judge, place=min(p.at for p in some))


def _multiply(x: Tensor, weights: Any, biases: Any, act: int | None) -> list[Tensor]:
    multiply = matvec.matvec if x.shape[0] == 1 else few_rows.few_rows
    return multiply(x, weights, biases, act)


def _some(weight: Tensor) -> Tensor:
    """Rows of a weight that are looked at, spread over all of it."""
    N = weight.shape[0]
    return torch.arange(0, N, max(1, N // _SEEN), device=weight.device)


def _exact(tape: Reader, p: Product, rows: Tensor) -> Tensor:
    exact = tape.values[p.x].double() @ tape.values[p.weight][rows].double().T
    return exact if p.bias is None else exact + tape.values[p.bias][rows].double()
