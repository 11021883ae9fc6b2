"""One decoding step as it is recorded: its inputs' memory, what must stay the same, and the steps of one cache."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_attn_patch.compat.torch import any_length

from . import fusing, remembered
from .capture import Recording, Repetition, WaitsError, not_collecting, record, rehearse
from .fusing import Fused
from .outputs import CACHE, map_output, reason_of, tensors_of
from .step_call import StepCall, growing_of
from .step_layers import StepRoom, TokenPlace, settle, standing_in, step_layers
from .tape import Tape

REHEARSALS = 1  # steps that run unrecorded first, watched for what cannot be recorded
COMPILATIONS = 1  # steps before those, of a compiled model: compiling waits for the device
MOST_STEPS = 4  # recordings kept for one cache
PAYS = 8  # runs that a recording must have served on average, after the first few
WARM = 1  # steps after a prompt that run unrecorded: an answer of a word or two is over before a recording pays
SHORT = 8  # nor does it pay for fewer steps than these, where their number is known
FUSED_SHORT = 96  # nor to write a step down for fewer than these: it takes what some 70 fused steps save
MASK_STEP = 1024  # columns that a mask grows by where no buffer says how long it can get


class Step:
    """One form of a decoding step for one cache: the memory of its inputs, and its recording."""

    def __init__(
        self,
        model: torch.nn.Module,
        inner: Callable[..., Any],
        compiled: bool,
        fuses: bool,
        call: StepCall,
        room: StepRoom,
    ) -> None:
        self.model, self.inner = weakref.ref(model), inner
        self.unwatched = COMPILATIONS if compiled else 0
        self.room, self.device = room, call.device
        self.place = TokenPlace(call.device)
        self.kwargs = dict(call.kwargs)
        self.copied: dict[str, Tensor] = {}
        for name, value in call.copied.items():
            self.copied[name] = self.kwargs[name] = torch.empty_like(value, memory_format=torch.contiguous_format)
        self.mask: Tensor | None = None
        if call.mask is not None:
            longest = max(room.ends(), default=(call.mask.shape[1] // MASK_STEP + 2) * MASK_STEP)
            self.mask = self.kwargs[call.mask_name] = call.mask.new_zeros(call.mask.shape[0], longest)
        self.cache_name = call.cache_name
        self.kwargs.pop(self.cache_name)
        if compiled:  # for buffers of any length: they grow, and the next call has others
            lengths = [(buffer, 2) for both in room.buffers if both is not None for buffer in both]
            for tensor, dim in [*lengths, *([] if self.mask is None else [(self.mask, 1)])]:
                any_length(tensor, dim)
        self.runs = 0
        self.recording: Recording | Repetition | None = None
        self.fuses = fuses and not compiled and fusing.can_fuse(call.device)
        self.tokens_form = call.tokens.shape, call.device
        self.tape: Tape | None = None  # while the step is written down
        self.written: Any = None  # the output of the forward that was written down
        self.fused: Fused | None = None
        self.remembered = False  # it was not written down for this call
        if self.fuses:
            self.kind = call.signature, room.form()
            self.form = *self.kind, *map(_tensor_form, self._tensors())
            self._recall(model)
        if 0 <= room.expected - room.position < FUSED_SHORT and not self.remembered:
            self.fuses = False

    def _tensors(self) -> list[Tensor | None]:
        """What another call of the same form has others of."""
        return [*self.copied.values(), self.mask, *self.place.tensors, *self.room.tensors()]

    def _recall(self, model: torch.nn.Module) -> None:
        """What is known of steps of this form: fewer kernels, or why not."""
        if type(model).forward is not self.inner:  # somebody has put another forward in its place
            return
        if reason := remembered.reason_for(model, self.kind):
            self.fuses, fusing.told[model] = False, reason
        elif fused := remembered.recall(model, self.form, self._tensors()):
            self.fused, self.remembered, fusing.told[model] = fused, True, fused.kinds

    def fits(self, call: StepCall, room: StepRoom) -> bool:
        """Whether it writes to the cache's memory as it is now, and the mask has room."""
        return self.room.same_buffers(room) and (self.mask is None or call.mask.shape[1] <= self.mask.shape[1])

    def load(self, call: StepCall, room: StepRoom) -> None:
        """Put a call's inputs where the step reads them."""
        for name, value in call.copied.items():
            self.copied[name].copy_(value)
        if self.mask is not None:
            self.mask[:, : call.mask.shape[1]].copy_(call.mask)
        self.place.set(*room.where)

    def forward(self, cache: Any) -> Any:
        """The model on the step's own memory; leaves the cache as it found it, but for K and V."""
        if self.fused is not None:
            return self.fused.run(cache)
        growing = growing_of(cache)
        with standing_in(growing, step_layers(growing, self.room, self.place)), self.tape or contextlib.nullcontext():
            output = self.inner(self.model(), **self.kwargs, **{self.cache_name: cache})
        if self.tape is not None:
            if not fusing.is_known(self.model(), self.tape, self.tokens_form):
                self.tape.run_again()
            self.written = map_output(output, lambda t: t, cache, CACHE)
        return output

    def work(self, cache: Any) -> Any:
        """What is recorded: the model's forward, and its output."""
        output = self.forward(cache)
        self.place.advance()
        return map_output(output, lambda t: t, cache, CACHE)

    def run(self, cache: Any) -> Any:
        """Run the step on what was loaded; its output is the caller's."""
        result = self.launch(cache)
        constants = {id(t) for t in self.kwargs.values() if isinstance(t, Tensor)}
        # a copy: the next run writes to the same memory
        return map_output(result, lambda t: t if id(t) in constants else t.clone(), CACHE, cache)

    def prepare(self, cache: Any) -> None:
        """What can be done for the first :meth:`launch` while the device is still at what was asked before."""
        if self.recording is None and self.remembered:
            self.recording = self._recorded(weakref.ref(cache))

    def launch(self, cache: Any) -> Any:
        """Start the step: unrecorded at first, then recorded. What it gives is overwritten by the next one."""
        where = self.place.leave()
        if self.recording is None:
            if self.runs < self.unwatched + REHEARSALS and not self.remembered:
                result = self._rehearsed(cache)
            else:
                self.recording = self._recorded(weakref.ref(cache))
        if self.recording is not None:
            result = self.recording.replay()
        self.runs += 1
        self.place.arrive(where)
        return result

    def _rehearsed(self, cache: Any) -> Any:
        """The step, unrecorded; written down, if it is to have fewer kernels."""
        with not_collecting() if self.fuses else contextlib.nullcontext():  # some ten thousand objects, for a moment
            self.tape = self._new_tape() if self.fuses else None
            work, watched = functools.partial(self.work, cache), self.runs >= self.unwatched
            try:
                result = rehearse(work, self.device, watched)
            except WaitsError:
                raise
            except Exception as error:  # is it what watches the operators?
                model = self.model()
                if self.tape is None or model is None:
                    raise
                self.tape = self.written = None
                result = rehearse(work, self.device, watched)
                self._not_fused(model, error)
            self._fuse()
        return result

    def _new_tape(self) -> Tape:
        tape = Tape()
        for value in self.kwargs.values():
            if isinstance(value, (Tensor, ModelOutput, tuple, list)):
                for tensor in tensors_of(value, CACHE):
                    tape.give(tensor)
        return tape

    def _fuse(self) -> None:
        """From what was written down to fewer kernels; where that fails, the step is recorded as it is."""
        tape, self.tape, model = self.tape, None, self.model()
        if tape is None or model is None:
            return
        try:
            self.fused = Fused(model, tape, self.written, self.tokens_form)
            fusing.told[model] = self.fused.kinds
            if type(model).forward is self.inner:
                remembered.keep(model, self.form, self.fused, self._tensors(), tape)
        except Exception as error:  # a model may run anything; nothing is lost but speed
            self._not_fused(model, error)
        self.written = None

    def _recorded(self, held: weakref.ref[Any]) -> Recording | Repetition:
        """The step, recorded; as it is where its fewer kernels cannot be."""
        me = weakref.ref(
            self
        )  # what is recorded on devices without graphs keeps its work: no cycle, which memory waits in
        work = lambda: me().work(held())  # type: ignore[union-attr]  # noqa: E731
        try:
            return record(work, self.device)
        except Exception as error:
            model = self.model()
            if self.fused is None or model is None:
                raise
            self.fused = None
            self._not_fused(model, error)
            return record(work, self.device)

    def _not_fused(self, model: torch.nn.Module, error: Exception) -> None:
        """Say why, and try no other step of this kind, whatever the sizes of its memory."""
        reason = fusing.told[model] = reason_of(error)
        if not isinstance(error, torch.OutOfMemoryError):
            remembered.keep_reason(model, self.kind, reason)


def _tensor_form(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


class Steps:
    """The recorded steps of one cache."""

    def __init__(self) -> None:
        self.known: dict[Any, Step] = {}
        self.recorded = self.runs = self.seen = 0

    def too_early(self, call: StepCall, room: StepRoom) -> bool:
        """Whether a step for this call would have to be recorded, and that does not pay yet, or any more."""
        if self._fitting(call, room) is not None:
            return False
        self.seen += 1
        if self.seen > WARM and not 0 <= room.expected - room.position < SHORT:
            return False
        self.forget_other_rooms(room)
        return True

    def _fitting(self, call: StepCall, room: StepRoom, key: Any = None) -> Step | None:
        step = self.known.get((call.signature, key))
        return step if step is not None and step.fits(call, room) else None

    def find(self, call: StepCall, room: StepRoom, make: Callable[[], Step], key: Any = None) -> Step | None:
        """The step for a call, made if there is none; None if recording does not pay for this cache.

        Args:
            key: what steps for the same call are told apart by.
        """
        step = self._fitting(call, room, key)
        if step is not None:
            return step
        if self.recorded >= MOST_STEPS and self.runs < PAYS * self.recorded:
            return None
        self.forget_other_rooms(room)
        if len(self.known) >= MOST_STEPS:
            self.known.pop(next(iter(self.known)))
        settle(room)
        step = self.known[call.signature, key] = make()
        self.recorded += 1
        return step

    def forget_other_rooms(self, room: StepRoom) -> None:
        """Steps for buffers that the cache has left would keep those alive."""
        self.known = {k: s for k, s in self.known.items() if s.room.same_buffers(room)}

    def forget(self) -> None:
        """A new prompt: what follows it is seen anew."""
        self.known.clear()
        self.seen = 0
