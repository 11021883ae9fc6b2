"""A recorded step with fewer kernels: what several small operators compute in turn, one kernel computes.

Each place is tried on the tensors of the step that was written down: the kernel must be as near to the same operators
in fp64 as they are themselves (twice their error at most, and one rounding of the largest number). Where it is not, the
operators stay.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.attn.backends import triton_decode
from hf_attn_patch.attn.devices import interpreted
from hf_attn_patch.compat.torch import operators_can_be_watched, to_copy_op

from .outputs import CACHE, UnfitError, map_output, tensors_of
from .program import Program
from .tape import NONE, Op, Slot, Tape

#: what was fused in a model's steps: kind -> how many in a step; or why nothing was
told: weakref.WeakKeyDictionary[torch.nn.Module, Counter[str] | str] = weakref.WeakKeyDictionary()
#: places that were tried before: of a model, for a row of operators and a form of the inputs, which were right
_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, list[bool]]] = weakref.WeakKeyDictionary()


def can_fuse(device: torch.device) -> bool:
    """Whether the kernels run there."""
    on_gpu = device.type == "cuda" or interpreted()
    return on_gpu and operators_can_be_watched and triton_decode.missing() is None


def _row_of(tape: Tape, form: Any) -> Any:
    """What tapes are told apart by: the operators in their order, the dtype of what they give last, and the tokens."""
    return form, tape.values[-1].dtype, tuple([op.run for op in tape.ops])


def is_known(model: Any, tape: Tape, form: Any) -> bool:
    """Whether the same row of operators of this model was tried before, on tokens of this form."""
    return _row_of(tape, form) in _known.get(model, ())


def fuse(model: torch.nn.Module, tape: Tape, results: Sequence[Tensor], form: Any) -> tuple[Program, Counter[str]]:
    """What is on a tape, in fewer kernels; and how many places of each kind were changed.

    Args:
        model: whose call is on it.
        results: what the call on the tape gave.
        form: of the call's tokens.
    """
    from .product_sites import products
    from .rotary_sites import rotaries  # needs triton
    from .sites import Reader, Site, gates, norms

    reader = Reader(tape)
    found: list[Site] = []
    taken: set[int] = set()
    for site in (*norms(reader), *rotaries(reader), *products(reader), *gates(reader)):
        if not taken & site.inside and _in_time(reader, site):
            found.append(site)
            taken |= site.inside
    verdicts, row = _known.setdefault(model, {}), _row_of(tape, form)
    if row not in verdicts:
        right = [_as_near(tape, site) for site in found]
        verdicts[row] = torch.stack(right).tolist() if right else []
    good = [site for site, ok in zip(found, verdicts[row], strict=True) if ok]
    slots = [tape.slot_of(result) for result in results]
    return Program(_replaced(tape, good), tape, [s for s in slots if s is not None]), Counter(s.kind for s in good)


def _in_time(reader: Any, site: Any) -> bool:
    """Whether what a site gives is read by nobody before its last operator."""
    return all(i in site.inside or i > site.place for slot in site.outputs for i in reader.read_by.get(slot, []))


def _replaced(tape: Tape, sites: Iterable[Any]) -> list[Op]:
    """The tape's operators with a function for each site; operators that nobody needs any more are still there."""
    new: dict[int, Op] = {}
    gone: set[int] = set()
    for site in sites:
        inputs = [Slot(slot) for slot in site.inputs]
        new[site.place] = Op(site.run, tuple(inputs), {}, inputs, list(site.outputs))
        outputs = set(site.outputs)
        gone |= {i for i in site.inside if tape.ops[i].nature.mutates or not outputs.isdisjoint(tape.ops[i].outputs)}
    ops: list[Op] = []
    for i, op in enumerate(tape.ops):
        if i not in gone:
            ops.append(op)
        if i in new:
            ops.append(new[i])
    return ops


def _as_near(tape: Tape, site: Any) -> Tensor:
    """Whether a site's function is as near to fp64 as the operators themselves, on the device."""
    given = [tape.values[slot] for slot in site.inputs]
    found = (site.trial or site.run)(*given)
    if site.judge is not None:
        judged: Tensor = site.judge(found)
        return judged
    from .sites import near

    truth = _in_fp64(tape, site.inside)
    fine = []
    for slot, value in zip(site.tried or site.outputs, found, strict=True):
        first = tape.values[slot]
        exact = truth.get(slot, first.double())
        fine.append(near(value, first, exact))
    return torch.stack(fine).all()


def _in_fp64(tape: Tape, inside: Iterable[int]) -> dict[int, Tensor]:
    """What the operators would give if nothing were rounded; in place nothing is written."""
    values: dict[int, Tensor] = {}

    def wide(slot: int) -> Tensor:
        value = values.get(slot, tape.values[slot])
        return value.double() if value.is_floating_point() else value

    for i in sorted(inside):
        op = tape.ops[i]
        if op.nature.mutates:
            continue
        given = {slot: wide(slot) for slot in op.inputs}
        result = [given[op.inputs[0]]] if op.run is to_copy_op else op(given)  # type: ignore[arg-type]
        for slot, value in zip(op.outputs, result, strict=True):
            if slot != NONE:
                values[slot] = value
    return values


class Fused:
    """A step's forward as operators, of which several are one kernel where that is as exact.

    Args:
        model: whose call it was.
        tape: with one call on it.
        output: what the call gave; :data:`CACHE` stands for the cache.
        form: of the call's tokens.

    Raises:
        UnfitError: running the operators again might not be the same call.
    """

    def __init__(self, model: torch.nn.Module, tape: Tape, output: Any, form: Any) -> None:
        tensors = tensors_of(output, CACHE)
        if reason := tape.why_not(tensors):
            raise UnfitError(reason)
        self.program, self.kinds = fuse(model, tape, tensors, form)
        nothing = torch.empty(0)
        self.form = map_output(output, lambda _: nothing, CACHE, CACHE)

    def on(self, tensors: dict[int, Tensor | None]) -> Fused:
        """The same with other tensors in some slots."""
        other = copy.copy(self)
        other.program = self.program.on(tensors)
        return other

    def run(self, cache: Any) -> Any:
        """The model's output."""
        found = iter(self.program.run())
        return map_output(self.form, lambda _: next(found), CACHE, cache)
