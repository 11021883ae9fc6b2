"""What stands before a model's ``forward``: decoding steps are recorded and run again, everything else goes through."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from hf_attn_patch.compat.calls import Arguments
from hf_attn_patch.compat.inductor import find_tuned_kernels
from hf_attn_patch.compat.transformers import attention_name
from hf_attn_patch.hf.attention_function import NAME

from .outputs import UnfitError, reason_of, tensors_of
from .step import Step, Steps
from .step_call import StepCall, growing_of, is_prompt
from .step_layers import StepRoom, advance, reserve

logger = logging.getLogger("hf_attn_patch")

T = TypeVar("T")

_inside = threading.local()


class Wish(NamedTuple):
    """How somebody wants steps recorded: compiled before, told loudly where they are not, with fewer kernels."""

    compiled: bool
    loud: bool = True
    fused: bool = True


class ModelState:
    """What is known of one model: whether its steps can be recorded, and those that are."""

    def __init__(self) -> None:
        self.hooks = -1
        self.chooses_outside = False  # tokens were to be chosen inside the step, and that failed
        self.reason: str | None = None
        self.refused: str | None = None
        self.off = False  # nobody asks for recordings any more
        self.uncompiled = False  # compiling was tried, and failed
        self.checked: set[Any] = set()
        self.said: set[str] = set()
        self.caches: weakref.WeakKeyDictionary[Any, Steps] = weakref.WeakKeyDictionary()

    def why_not(self, model: Any, ask: Callable[[Any], str | None], anew: bool = False) -> str | None:
        """Why the model's steps are not recorded; asks it again where something may have been hooked in since."""
        if self.refused is not None:
            return self.refused
        if (name := attention_name(model.config)) != NAME:
            return f"its attn_implementation is {name!r} and not {NAME!r}"
        if anew or self.hooks != RemovableHandle.next_id:
            self.hooks = RemovableHandle.next_id
            self.reason = ask(model)
        return self.reason

    def refuse(self, model: torch.nn.Module, reason: str, compiled: bool, loud: bool) -> None:
        """Once and for all: the model goes on without compiling, or else as it always did."""
        if compiled:
            self.uncompiled = True
        else:
            self.refused = reason
        self.caches.clear()
        self.say(model, reason, loud, compiled)

    def say(self, model: torch.nn.Module, reason: str, loud: bool, compiled: bool = False) -> None:
        """A warning (or information, where nobody asked by name), once for each reason."""
        if reason not in self.said:
            self.said.add(reason)
            what = "compiled" if compiled else "recorded as CUDA graphs"
            level = logging.WARNING if loud else logging.INFO
            logger.log(level, "decoding steps of %s are not %s: %s", type(model).__name__, what, reason)


_states: weakref.WeakKeyDictionary[torch.nn.Module, ModelState] = weakref.WeakKeyDictionary()


def state_of(model: torch.nn.Module) -> ModelState:
    """What is known of a model; made if nothing is."""
    if model not in _states:
        _states[model] = ModelState()
    return _states[model]


def forget_state(model: torch.nn.Module) -> None:
    """All that is known of a model, and its recorded steps."""
    _states.pop(model, None)


def forget_steps(model: torch.nn.Module, cache: Any) -> None:
    """A new run with a cache that an earlier one may have left: the model's weights and code may be others since."""
    if isinstance(cache, Cache) and (steps := state_of(model).caches.get(cache)) is not None:
        steps.forget()


class RecordedForward:
    """Stands before a model's ``forward``: decoding steps are recorded and run again, everything else goes through."""

    def __init__(
        self,
        inner: Callable[..., Any],
        arguments: Arguments,
        asked: dict[Any, Wish],
        why_not: Callable[[Any], str | None],
    ) -> None:
        self.inner, self.arguments, self.why_not = inner, arguments, why_not
        self.asked = asked  # by whom, and how: the last one counts
        self.loud = any(wish.loud for wish in asked.values())
        self.compiles, _, self.fuses = [*asked.values()][-1]
        self._compiled: dict[bool, Callable[..., Any]] = {}

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.arguments.renames(kwargs):
            try:
                args, kwargs = (), self.arguments.by_name(args, kwargs)
            except TypeError:  # two caches, say: the model's own forward tells what it makes of them
                return self.inner(model, *args, **kwargs)
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or model.training
            or getattr(_inside, "busy", False)
            or (kwargs.get(self.arguments.cache) is None and not args)
        ):
            return self.inner(model, *args, **kwargs)
        given = self.arguments.by_name(args, kwargs) if args else kwargs
        if given.get(self.arguments.cache) is None:
            return self.inner(model, *args, **kwargs)
        return self.alone(functools.partial(self._step, model, given))

    def alone(self, work: Callable[[], T]) -> T:
        """Within, calls of models go through."""
        _inside.busy = True
        try:
            return work()
        finally:
            _inside.busy = False

    def fitting(self, model: Any, state: ModelState, kwargs: dict[str, Any]) -> tuple[StepCall, StepRoom, Steps] | None:
        """A call as a step that can be recorded, the memory it writes to, and the steps of its cache; None, and the log
        says why, if it is none."""
        try:
            if reason := state.why_not(model, self.why_not):
                raise UnfitError(reason)
            cache = kwargs.get(self.arguments.cache)
            call = StepCall(kwargs, self.arguments.cache)
            room = reserve(growing_of(cache))
            if room is None:
                raise UnfitError("its cache has layers that do not grow in place, or not together")
        except UnfitError as error:
            state.say(model, str(error), self.loud)
            return None
        steps = state.caches.get(cache)
        if steps is None:
            steps = state.caches[cache] = Steps()
        return call, room, steps

    def making(self, model: Any, state: ModelState, call: StepCall, room: StepRoom) -> tuple[Any, ...]:
        """What a :class:`Step` is made of."""
        compiles = self.compiles and not state.uncompiled
        codes = any(buffers is not None and len(buffers) > 2 for buffers in room.buffers)
        if compiles and (codes or any(room.shared)):
            what = "its cache holds codes, which are read as they are" if codes else "rows share a prompt, in parts"
            reason = f"{what}, which torch.compile cannot trace"
            state.say(model, reason, self.loud, True)
            compiles = False
        return model, self._compiled_for(call) if compiles else self.inner, compiles, self.fuses, call, room

    def _compiled_for(self, call: StepCall) -> Callable[..., Any]:
        """The forward, compiled. Of one row's products inductor makes kernels of its own, which read the weights faster
        than cuBLAS, if it may try out their tiles; once, and not in each process."""
        one_row = call.device.type == "cuda" and call.tokens.shape[0] == 1
        if one_row not in self._compiled:
            if one_row:
                find_tuned_kernels()
            options: dict[str, Any] = {"options": {"coordinate_descent_tuning": True}} if one_row else {}
            self._compiled[one_row] = torch.compile(self.inner, fullgraph=True, **options)
        return self._compiled[one_row]

    def form(self, call: StepCall, room: StepRoom) -> Any:
        """What steps are compared with ordinary ones for."""
        dtype = room.buffers[0] is not None and room.buffers[0][0].dtype
        return call.mask is None, call.device, dtype, any(room.shared)

    def _step(self, model: Any, kwargs: dict[str, Any]) -> Any:
        cache, state = kwargs[self.arguments.cache], state_of(model)
        if state.off:
            return self.inner(model, **kwargs)
        if is_prompt(kwargs, cache):  # whatever else changed with it: what follows is recorded anew
            state.hooks = -1
            forget_steps(model, cache)
            return self.inner(model, **kwargs)
        found = self.fitting(model, state, kwargs)
        if found is None:
            return self.inner(model, **kwargs)
        call, room, steps = found
        if steps.too_early(call, room):
            return self.inner(model, **kwargs)
        making = self.making(model, state, call, room)
        step = steps.find(call, room, functools.partial(Step, *making))
        if step is None:
            reason = "the form of its inputs or the memory of its cache changes too often for that to pay"
            state.say(model, reason, self.loud)
            return self.inner(model, **kwargs)
        steps.runs += 1
        form = self.form(call, room)
        # not below: what it raises is the model's own, and its cache has been written to
        ordinary = None if form in state.checked else self.inner(model, **kwargs)
        try:
            step.load(call, room)
            if ordinary is not None:
                _compare(tensors_of(step.run(cache), cache), tensors_of(ordinary, cache))
                state.checked.add(form)
                return ordinary
            output = step.run(cache)
        except Exception as error:  # whatever a model's code does not stand; if it is not that, it is raised below
            state.refuse(model, reason_of(error), making[2], self.loud)
            return self.inner(model, **kwargs) if ordinary is None else ordinary
        advance(growing_of(cache))
        return output


def _compare(found: list[Tensor], expected: list[Tensor]) -> None:
    """A step on whole buffers against the ordinary one: the same but for rounding, or it is not recorded."""
    pairs = list(zip(found, expected, strict=True))
    far = [_distance(a, b) for a, b in pairs]
    worst = float(torch.stack(far).max()) if far else 0.0
    limit = 0.05 if any(a.dtype in (torch.float16, torch.bfloat16) for a, _ in pairs) else 1e-3
    if not worst <= limit:
        raise UnfitError(f"its step on a buffer with room gives other results (by {worst:.2g})")


def _distance(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise UnfitError("its step on a buffer with room gives results of other shapes")
    return (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)


def stand_before(model: torch.nn.Module, recorder: RecordedForward) -> None:
    """Put a recorder before a model's ``forward``: as a method of the instance, which a deep copy of the model takes
    along, bound to the copy; and as a function, which torch.compile of the model asks for."""

    @functools.wraps(recorder.inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return recorder(self, *args, **kwargs)

    forward.recorder = recorder  # type: ignore[attr-defined]
    model.__dict__["forward"] = MethodType(forward, model)


def recorder_of(model: torch.nn.Module) -> RecordedForward | None:
    """What records a model's steps, if somebody asks for it."""
    recorder = getattr(getattr(model.__dict__.get("forward"), "__func__", None), "recorder", None)
    return recorder if isinstance(recorder, RecordedForward) else None
