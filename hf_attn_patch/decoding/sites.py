"""Places on a tape where several operators are one kernel's work: found by what is computed, not by a module's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.attn.kernels import small
from hf_attn_patch.compat.torch import to_copy_op

from .tape import NONE, Op, Slot, Tape

aten = torch.ops.aten
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Site:
    """Operators that one function replaces.

    Args:
        kind: what it is, for people.
        inside: which operators of the tape, by their numbers.
        inputs: slots of what the function is called with.
        outputs: slots of what it returns.
        run: the function: tensors -> list of tensors.
        trial: called like ``run``, without writing to its inputs; gives the tensors of ``tried``.
        tried: slots whose values ``trial`` gives; the outputs unless told.
        judge: says on the device whether what ``run`` gives is right, where running the operators in fp64 is too much.
        place: the operator after which the function runs; the last one unless told.
    """

    kind: str
    inside: set[int]
    inputs: list[int]
    outputs: list[int]
    run: Callable[..., list[Any]]
    trial: Callable[..., list[Any]] | None = None
    tried: list[int] | None = None
    judge: Callable[[list[Tensor]], Tensor] | None = None
    place: int = -1

    def __post_init__(self) -> None:
        if self.place < 0:
            self.place = max(self.inside)


def near(found: Tensor, first: Tensor, exact: Tensor) -> Tensor:
    """Whether ``found`` is as near to ``exact`` as ``first`` is, on the device: twice its error at most, and one
    rounding of the largest number."""
    if found.shape != first.shape or found.dtype != first.dtype:
        return torch.zeros((), dtype=torch.bool, device=first.device)
    slack = torch.finfo(first.dtype).eps * exact.abs().amax()
    return (found.double() - exact).abs().amax() <= 2 * (first.double() - exact).abs().amax() + slack


class Reader:
    """A tape read backwards: who made a slot, and who reads it."""

    def __init__(self, tape: Tape) -> None:
        self.tape, self.values = tape, tape.values
        self.made_by: dict[int, int] = {}
        self.read_by: dict[int, list[int]] = {}
        for i, op in enumerate(tape.ops):
            for slot in op.outputs:
                if slot != NONE and slot not in tape.given:
                    self.made_by.setdefault(slot, i)
            for slot in op.inputs:
                self.read_by.setdefault(slot, []).append(i)
        self.written = tape.written

    def maker(self, slot: Any, *operators: Any) -> tuple[int, Op] | None:
        """The operator that made a slot, if it is one of these."""
        i = self.made_by.get(slot) if isinstance(slot, int) else None
        if i is None or self.tape.ops[i].run not in operators:
            return None
        return i, self.tape.ops[i]

    def reader(self, slot: int, *operators: Any) -> tuple[int, Op] | None:
        """The one operator that reads a slot, if there is no other and it is one of these."""
        readers = self.read_by.get(slot, [])
        if len(readers) != 1 or self.tape.ops[readers[0]].run not in operators:
            return None
        return readers[0], self.tape.ops[readers[0]]

    def like(self, slot: int) -> Tensor:
        """A meta tensor of a slot's shape, strides and dtype."""
        t = self.values[slot]
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    def steady(self, *slots: int) -> bool:
        """Whether nobody writes to these tensors in place."""
        return not any(self.tape.memory(slot) in self.written for slot in slots)

    def rows(self, *slots: int) -> bool:
        """Whether the last dimension of these tensors is contiguous, behind three others at most."""
        return all(
            t.dim() <= 4 and t.dtype in _FLOATS and t.numel() > 0 and (t.shape[-1] == 1 or t.stride(-1) == 1)
            for t in (self.values[slot] for slot in slots)
        )


def is_slot(value: Any) -> bool:
    return type(value) is Slot


def norms(tape: Reader) -> Iterator[Site]:
    """RMSNorm, with the addition before it: found at its reciprocal square root."""
    for i, op in enumerate(tape.tape.ops):
        if op.run is aten.rsqrt.default and (site := _norm(tape, i, op)) is not None:
            yield site


def _norm(tape: Reader, at: int, root: Op) -> Site | None:
    found = _mean_of_squares(tape, root.args[0])
    if found is None or (scaled := tape.reader(root.outputs[0], aten.mul.Tensor)) is None:
        return None
    wide, eps, inside = found
    inside |= {at, scaled[0]}
    if set(scaled[1].args) != {wide, root.outputs[0]}:
        return None
    x = wide
    if (cast := tape.maker(wide, to_copy_op)) is not None:
        if tape.values[wide].dtype != torch.float32:
            return None
        x = cast[1].args[0]
        inside.add(cast[0])
    if tape.values[wide].dtype != torch.float32 or tape.values[x].shape[-1] > small.MOST:
        return None
    weighted = _weighted(tape, scaled[1].outputs[0], tape.values[x])
    if weighted is None:
        return None
    form, weight, out, chain = weighted
    inside |= chain
    inputs, outputs, added = [x], [out], tape.maker(x, aten.add.Tensor)
    if added is not None and _plain_sum(tape, added[1]):
        inputs, outputs = [*added[1].args], [out, x]
        inside.add(added[0])
    adds = len(outputs) == 2
    if not tape.rows(*inputs, out) or not tape.steady(*inputs, *outputs):
        return None
    like = tape.like(out)
    if weight is not None:
        inputs.append(weight)

    def run(*given: Any) -> list[Any]:
        first, *rest = given
        return small.norm(first, rest.pop(0) if adds else None, rest.pop(0) if rest else None, eps, form, like)

    return Site("norms", inside, inputs, outputs, run)


def _mean_of_squares(tape: Reader, slot: Any) -> tuple[int, float, set[int]] | None:
    """(x, eps, operators) of ``mean(x ** 2, -1, keepdim) + eps``."""
    added = tape.maker(slot, aten.add.Tensor)
    if added is None or not isinstance(added[1].args[1], (int, float)) or is_slot(added[1].args[1]):
        return None
    mean = tape.maker(added[1].args[0], aten.mean.dim)
    if mean is None or list(mean[1].args[1]) not in ([-1], [tape.values[mean[1].args[0]].dim() - 1]):
        return None
    square = tape.maker(mean[1].args[0], aten.pow.Tensor_Scalar, aten.mul.Tensor)
    if square is None or len(mean[1].args) < 3 or mean[1].args[2] is not True or added[1].kwargs:
        return None
    x, twice = square[1].args
    if (square[1].run is aten.pow.Tensor_Scalar and twice != 2) or (square[1].run is aten.mul.Tensor and twice != x):
        return None
    return x, float(added[1].args[1]), {added[0], mean[0], square[0]}


def _plain_sum(tape: Reader, op: Op) -> bool:
    if len(op.args) != 2 or op.kwargs or not all(map(is_slot, op.args)):
        return False
    a, b = op.args
    if a == b:
        return False
    one, other = tape.values[a], tape.values[b]
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _weighted(tape: Reader, slot: int, x: torch.Tensor) -> tuple[int, int | None, int, set[int]] | None:
    """(form, weight, result, operators) of what becomes of a normed fp32 tensor until it has x's dtype again."""
    N = x.shape[-1]
    if x.dtype != torch.float32 and (cast := tape.reader(slot, to_copy_op)) is not None:
        rounded = cast[1].outputs[0]
        if tape.values[rounded].dtype != x.dtype:
            return None
        times = tape.reader(rounded, aten.mul.Tensor)
        weight = None if times is None else _vector(tape, other_factor(times[1], rounded), N)
        if times is None or weight is None or tape.values[times[1].outputs[0]].dtype != x.dtype:
            return small.BARE, None, rounded, {cast[0]}
        return small.CAST, weight, times[1].outputs[0], {cast[0], times[0]}
    times = tape.reader(slot, aten.mul.Tensor)
    if times is None:
        return None
    factor, inside, form = other_factor(times[1], slot), {times[0]}, small.WIDE
    more = tape.maker(factor, aten.add.Tensor)
    if more is not None and not is_slot(more[1].args[1]) and more[1].args[1] == 1 and not more[1].kwargs:
        factor, form = more[1].args[0], small.ONE_MORE
    if (wide := tape.maker(factor, to_copy_op)) is not None and tape.values[factor].dtype == torch.float32:
        factor = wide[1].args[0]
    weight, out = _vector(tape, factor, N), times[1].outputs[0]
    if weight is None or tape.values[out].dtype != torch.float32:
        return None
    if x.dtype != torch.float32:
        cast = tape.reader(out, to_copy_op)
        if cast is None or tape.values[cast[1].outputs[0]].dtype != x.dtype:
            return None
        inside.add(cast[0])
        out = cast[1].outputs[0]
    return form, weight, out, inside


def other_factor(op: Op, slot: int) -> Any:
    """The factor beside ``slot``."""
    a, b = op.args
    return b if is_slot(a) and a == slot else a


def _vector(tape: Reader, slot: Any, N: int) -> int | None:
    """A weight [N] that stays what it is."""
    if not is_slot(slot) or slot not in tape.tape.given or not tape.steady(slot):
        return None
    t = tape.values[slot]
    return slot if t.shape == (N,) and t.is_contiguous() and t.dtype in _FLOATS else None


ACTIVATIONS = {aten.silu.default: small.SILU, aten.relu.default: small.RELU, aten.gelu.default: small.GELU}


def activation(op: Op) -> int:
    """Which activation of the kernels' an operator is."""
    if op.run is aten.gelu.default and op.kwargs.get("approximate", "none") == "tanh":
        return small.GELU_TANH
    return ACTIVATIONS[op.run]


def gates(tape: Reader) -> Iterator[Site]:
    """An activation times something else of its shape."""
    for i, op in enumerate(tape.tape.ops):
        if op.run not in ACTIVATIONS or (times := tape.reader(op.outputs[0], aten.mul.Tensor)) is None:
            continue
        act = activation(op)
        gate, up, out = op.args[0], other_factor(times[1], op.outputs[0]), times[1].outputs[0]
        if not is_slot(up) or not tape.rows(gate, up, out) or not tape.steady(gate, up, out):
            continue
        g, u, like = tape.values[gate], tape.values[up], tape.like(out)
        if g.shape != u.shape or g.dtype != u.dtype or like.dtype != g.dtype:
            continue

        def run(gate: Any, up: Any, act: int = act, like: Any = like) -> list[Any]:
            return small.gated(gate, up, act, like)

        yield Site("gated activations", {i, times[0]}, [gate, up], [out], run)
