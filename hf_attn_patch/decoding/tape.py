"""A model's step written down as the operators that it runs, so that they can be run again without the model, and
several of them replaced by one.

What is written down is one call with tensors that hold numbers: shapes, memory and constants are those of that call,
which a recorded step keeps anyway. Kernels that PyTorch does not see (started by Python code, past its operators) are
not on the tape. Where there may be some, :meth:`Tape.why_not` says so: by memory that is read though nobody wrote it,
and by operators that, run again (:meth:`Tape.run_again`), give something else than what stands in their memory.

A tensor subclass (the DTensor of tensor parallelism, say) is written down as the plain operators that it makes of each
call, and a collective as a function of its own (``collectives.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_attn_patch.compat.torch import DispatchMode, has_no_numbers, is_composite, is_operator, literal_op, schema_of

from .collectives import Collective, collective_of

_EMPTY = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "empty_permuted")
_PLAIN = (Tensor, torch.nn.Parameter)
_TOLERANCE = 2e-2  # operators run again may choose another algorithm, no more


NONE = -1  # stands for what an operator returns that is no tensor


class Slot(int):
    """The number of a tensor on the tape, where it stands for an argument."""


class Nature(NamedTuple):
    """What an operator does beside computing.

    Attributes:
        mutates: it writes to its arguments.
        views: it returns memory of its arguments.
        draws: it takes random numbers.
        makes_room: its result is memory that nobody wrote.
        meets: it waits for other processes, which do the same.
    """

    mutates: bool = False
    views: bool = False
    draws: bool = False
    makes_room: bool = False
    meets: bool = False

    @property
    def computes(self) -> bool:
        """It gives the same for the same arguments, and does nothing else."""
        return not any(self)


@functools.lru_cache(4096)
def nature_of(run: Any) -> Nature:
    """Of an operator of PyTorch."""
    schema = schema_of(run)
    room = schema.name.split("::")[1] in _EMPTY
    shares = any(r.alias_info is not None for r in schema.returns)
    draws = torch.Tag.nondeterministic_seeded in run.tags
    return Nature(schema.is_mutable, shares and not schema.is_mutable, draws, room)


class Op:
    """One operator: what is called with what, and where its results go.

    Args:
        run: called with the arguments; a function that writes to some of them has the attribute ``writes``, one that
            waits for other processes ``meets``.
        args, kwargs: a :class:`Slot` for each tensor, also in lists and tuples.
        inputs: all those slots.
        outputs: slots of the tensors that it returns, flat; :data:`NONE` for what is none.
    """

    __slots__ = ("args", "inputs", "kwargs", "nature", "outputs", "run")

    def __init__(
        self, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Slot], outputs: list[int]
    ) -> None:
        self.run, self.args, self.kwargs, self.inputs, self.outputs = run, args, kwargs, inputs, outputs
        known = is_operator(run)
        own = Nature(mutates=getattr(run, "writes", False), meets=getattr(run, "meets", False))
        self.nature = nature_of(run) if known else own

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """Run on the tensors of the slots; its results, flat."""
        args = [values[a] if type(a) is Slot else _filled(a, values) for a in self.args]
        kwargs = {k: _filled(v, values) for k, v in self.kwargs.items()} if self.kwargs else self.kwargs
        return flat(self.run(*args, **kwargs))


def _filled(value: Any, values: Any) -> Any:
    """An argument with the tensors of its slots."""
    if type(value) is Slot:
        return values[value]
    if type(value) in (list, tuple):
        return type(value)(_filled(v, values) for v in value)
    return value


def flat(result: Any) -> list[Any]:
    """What an operator returned, as a list without lists."""
    if type(result) in (list, tuple):
        return [one for part in result for one in flat(part)]
    return [] if result is None else [result]


class Tape(DispatchMode):
    """Within, operators run and are written down.

    Attributes:
        ops: in order.
        values: the tensors of the slots, as they were left by the call.
        given: slots of the tensors that no operator made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.values: list[Tensor] = []
        self.given: set[int] = set()
        self._slots: dict[int, Slot] = {}
        self._left: dict[int, Tensor] = {}  # tensors whose memory a collective wrote to by another name
        self._by_memory: dict[int, list[Slot]] = {}  # of the first ``_looked_at`` slots
        self._looked_at = 0
        self._strange: str | None = None
        self._wrong: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if types and any(kind not in _PLAIN for kind in types):  # it makes plain operators of the call, which come here
            return func(*args, **kwargs) if any(map(has_no_numbers, types)) else NotImplemented
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if (collective := collective_of(func)) is not None:
            return self._meet(collective, args, kwargs)
        inputs: list[Slot] = []
        told = tuple([self._told(a, inputs) for a in args])
        told_by_name = {k: self._told(v, inputs) for k, v in kwargs.items()} if kwargs else kwargs
        result = func(*args, **kwargs)
        outputs: list[int] = [self._slot(v) if isinstance(v, Tensor) else NONE for v in flat(result)]
        if NONE in outputs:
            self._strange = f"it reads numbers of the device ({func})"
        self.ops.append(Op(func, told, told_by_name, inputs, outputs))
        return result

    def _meet(self, collective: Collective, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A collective. What it writes in place is another slot's from then on: on the tape, it only computes."""
        if collective.waits:
            return collective.func(*args, **kwargs)
        inputs: list[Slot] = []
        told = tuple([self._told(a, inputs) for a in args])
        if not collective.known or kwargs:
            self._strange = f"its processes meet in {collective.func}"
        elif collective.in_place:
            for tensor in args[0]:
                self._leave(tensor)
        result = collective.func(*args, **kwargs)
        outputs = [self._slot(v) for v in flat(result) if isinstance(v, Tensor)]
        self.ops.append(Op(collective, told, kwargs, inputs, [*outputs]))
        return result

    def _leave(self, tensor: Tensor) -> None:
        """A tensor is written to: its slot, and those of its views, keep what stands there now; the tensor gets another
        slot, and its views are not to be read any more."""
        for i in range(self._looked_at, len(self.values)):
            self._by_memory.setdefault(self.memory(i), []).append(Slot(i))
        self._looked_at = len(self.values)
        storage = tensor.untyped_storage()
        slots, copied = self._by_memory.pop(storage.data_ptr()), storage.clone()
        for slot in slots:
            if slot in self.given:
                self._strange = "a collective writes to memory that the step did not make"
            old = self.values[slot]
            del self._slots[id(old)]
            if old is not tensor:
                self._left[id(old)] = old
            same = torch.empty(0, dtype=old.dtype, device=old.device)
            self.values[slot] = same.set_(copied, old.storage_offset(), old.shape, old.stride())
        self._by_memory[copied.data_ptr()] = slots

    def _told(self, value: Any, inputs: list[Slot]) -> Any:
        """An argument with slots for its tensors, which are added to ``inputs``."""
        if isinstance(value, Tensor):
            inputs.append(self._slot(value, given=True))
            return inputs[-1]
        if type(value) in (list, tuple):
            return type(value)([self._told(v, inputs) for v in value])
        return value

    def _slot(self, tensor: Tensor, given: bool = False) -> Slot:
        known = self._slots.get(id(tensor))
        if known is not None:
            return known
        if type(tensor) not in _PLAIN:
            self._strange = f"its operators take a {type(tensor).__name__}"
        elif id(tensor) in self._left:
            self._strange = "it reads by another name what a collective wrote"
        slot = self._slots[id(tensor)] = Slot(len(self.values))
        if given:
            self.given.add(slot)
        self.values.append(tensor)  # kept: no other tensor gets its id
        return slot

    def give(self, tensor: Tensor) -> None:
        """A tensor that is there before the call, which may return it without an operator."""
        self._slot(tensor, given=True)

    def slot_of(self, tensor: Tensor) -> Slot | None:
        """Where a tensor stands on the tape, if it does."""
        return self._slots.get(id(tensor))

    def memory(self, slot: int) -> int:
        """What tells the memory of tensors apart; 0 for those that have none."""
        return self.values[slot].untyped_storage().data_ptr()

    @functools.cached_property
    def written(self) -> set[int]:
        """The memory that operators wrote to in place."""
        found: set[int] = set()
        for op in self.ops:
            if op.nature.mutates and not op.nature.makes_room:
                for argument, value in _by_argument(op):
                    if argument.alias_info is not None and argument.alias_info.is_write:
                        found |= {self.memory(v) for v in flat(value) if type(v) is Slot}
        return found

    @functools.cached_property
    def literals(self) -> set[int]:
        """Slots of tensors that were made of numbers in the code, and stay what they are."""
        made = {slot for op in self.ops if op.run is literal_op for slot in op.inputs}
        return {slot for slot in made & self.given if self.memory(slot) not in self.written}

    def run_again(self) -> None:
        """Run the operators that write nothing in place once more, right after the call, and compare; waits for
        nothing."""
        if self._strange is not None:
            return
        self._wrong = [
            _differs(again, self.values[slot])
            for op in self.ops
            if op.nature.computes
            and not any(self.memory(s) in self.written for s in (*op.inputs, *op.outputs) if s != NONE)
            for again, slot in zip(op(self.values), op.outputs, strict=True)
            if slot != NONE
        ]

    def why_not(self, results: Sequence[Tensor] = ()) -> str | None:
        """Why running the operators again might not be the same call, or None; waits for the device.

        Args:
            results: what the call gave.
        """
        if self._strange is not None:
            return self._strange
        rooms = {self.memory(slot) for op in self.ops if op.nature.makes_room for slot in op.outputs if slot != NONE}
        untold = rooms - self.written - {0}
        read: list[int] = []
        if untold:
            read = [slot for op in self.ops if not (op.nature.views or op.nature.makes_room) for slot in op.inputs]
        read += [slot for result in results if (slot := self.slot_of(result)) is not None]
        if any(self.memory(slot) in untold for slot in read):
            return "it runs kernels that are no operators of PyTorch"
        if any(self.slot_of(result) is None for result in results):
            return "it returns what none of its operators made"
        by_device: dict[torch.device, list[Tensor]] = {}
        for flag in self._wrong:
            by_device.setdefault(flag.device, []).append(flag)
        if any(bool(torch.stack(flags).any()) for flags in by_device.values()):
            return "its operators give something else when they are run again"
        return None


def _by_argument(op: Op) -> list[tuple[Any, Any]]:
    """The arguments of an operator's schema with their values."""
    schema = schema_of(op.run)
    given = [*zip(schema.arguments, op.args, strict=False)]
    return given + [(a, op.kwargs[a.name]) for a in schema.arguments if a.name in op.kwargs]


def _differs(again: Tensor, first: Tensor) -> Tensor:
    """Whether a tensor is another one but for rounding, on the device."""
    if not first.is_floating_point():
        return (again != first).any()
    a, b = again.float(), first.float()
    scale = b.abs().nan_to_num(0, 0, 0).amax() if b.numel() else b.sum()
    same = (a == b) | ((a - b).abs() <= _TOLERANCE * scale) | (a.isnan() & b.isnan())
    return (~same).any()
