"""Decoding steps as CUDA graphs: one launch a token instead of some forty a layer.

Decoding one token is little work in many kernels, and the host needs longer to start them than the GPU to run them. So
a step is recorded once, for one cache and one form of the inputs, and run again for each token. The model is its own:
what is recorded is its ``forward``, on a cache whose layers write at a place that is read on the device
(``step_layers.py``). Outside, nothing changes: it is the model's ``forward`` that is replaced, so ``generate`` and
loops of one's own take part, and the cache is a :class:`GrowingCache` before and after each step.

A step runs as it always did wherever it cannot be recorded: hooks, several devices, offloading, another cache, models
that look at lengths on the host, and so on; the log says why, once for each model and reason: as a warning if recording
was asked for by name, else as information. What a recorded step computes is compared with the ordinary one, once a model.

A recorded step can be compiled as well: its shapes never change, so torch.compile takes it whole, and fuses the many
small kernels between the large ones.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from hf_attn_patch.compat.calls import Arguments
from hf_attn_patch.compat.torch import forward_hooks
from hf_attn_patch.compat.transformers import attention_name, captures_outputs, has_accelerate_hook
from hf_attn_patch.handle import Handle, of_each
from hf_attn_patch.hf.attention_function import NAME

from .capture import WaitsError
from .step import StepCall, Steps, UnfitError, growing_of, is_prompt, tensors_of
from .step_layers import advance, reserve

logger = logging.getLogger("hf_attn_patch")

DEVICES = {"cuda"}

_inside = threading.local()


class Wish(NamedTuple):
    """How somebody wants steps recorded: compiled before, and told loudly where they are not."""

    compiled: bool
    loud: bool = True


def can_record_here() -> bool:
    """Whether this machine has a device on which steps are recorded."""
    return any(kind == "cpu" or torch.get_device_module(kind).is_available() for kind in DEVICES)


def why_not(model: Any) -> str | None:
    """Why no decoding step of ``model`` can be recorded, or None."""
    devices = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    if len(devices) != 1:
        return "its weights are on several devices"
    if next(iter(devices)).type not in DEVICES:
        return f"there are no CUDA graphs on {next(iter(devices))}"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return "its quantization cannot be recorded"
    if kinds := _rope_types(model.config) & {"dynamic", "longrope"}:
        return f"its {kinds.pop()} position embedding changes with the length"
    for name, module in model.named_modules():
        if has_accelerate_hook(module) or (module is not model and _hooked(module)):
            return f"it has hooks ({name})"
    return None


def _rope_types(config: Any) -> set[str]:
    """All ``rope_type`` in a config and those inside it."""
    found: set[str] = set()
    pending = [config.to_dict()]
    while pending:
        one = pending.pop()
        if isinstance(one.get("rope_type"), str):
            found.add(one["rope_type"])
        pending += [value for value in one.values() if isinstance(value, dict)]
    return found


def _hooked(module: torch.nn.Module) -> bool:
    """Hooks run when a step is recorded, not when it runs; those of transformers' output capturing do nothing then."""
    return any(not captures_outputs(hook) for hook in forward_hooks(module))


class ModelState:
    """What is known of one model: whether its steps can be recorded, and those that are."""

    def __init__(self) -> None:
        self.hooks = -1
        self.reason: str | None = None
        self.refused: str | None = None
        self.off = False  # nobody asks for recordings any more
        self.uncompiled = False  # compiling was tried, and failed
        self.checked: set[Any] = set()
        self.said: set[str] = set()
        self.caches: weakref.WeakKeyDictionary[Any, Steps] = weakref.WeakKeyDictionary()

    def why_not(self, model: Any) -> str | None:
        """Why the model's steps are not recorded; asks it again only where something may have been hooked in since."""
        if self.refused is not None:
            return self.refused
        if (name := attention_name(model.config)) != NAME:
            return f"its attn_implementation is {name!r} and not {NAME!r}"
        if self.hooks != RemovableHandle.next_id:
            self.hooks = RemovableHandle.next_id
            self.reason = why_not(model)
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


def _state(model: torch.nn.Module) -> ModelState:
    if model not in _states:
        _states[model] = ModelState()
    return _states[model]


class RecordedForward:
    """Stands before a model's ``forward``: decoding steps are recorded and run again, everything else goes through."""

    def __init__(self, inner: Callable[..., Any], arguments: Arguments, asked: dict[Any, Wish]) -> None:
        self.inner, self.arguments = inner, arguments
        self.asked = asked  # by whom, and how: the last one counts
        self.loud = any(wish.loud for wish in asked.values())
        self.compiled = torch.compile(inner, fullgraph=True) if [*asked.values()][-1].compiled else None
        functools.update_wrapper(self, inner)

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.arguments.renames(kwargs):
            args, kwargs = (), self.arguments.by_name(args, kwargs)
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
        _inside.busy = True
        try:
            return self._step(model, given)
        finally:
            _inside.busy = False

    def _step(self, model: Any, kwargs: dict[str, Any]) -> Any:
        cache, state = kwargs[self.arguments.cache], _state(model)
        if state.off:
            return self.inner(model, **kwargs)
        steps = state.caches.get(cache) if isinstance(cache, Cache) else None
        if is_prompt(kwargs, cache):  # whatever else changed with it: what follows is recorded anew
            state.hooks = -1
            if steps is not None:
                steps.forget()
            return self.inner(model, **kwargs)
        try:
            if reason := state.why_not(model):
                raise UnfitError(reason)
            call = StepCall(kwargs, self.arguments.cache)
            room = reserve(growing_of(cache))
            if room is None:
                raise UnfitError("its cache has layers that do not grow in place, or not together")
        except UnfitError as error:
            state.say(model, str(error), self.loud)
            return self.inner(model, **kwargs)
        if steps is None:
            steps = state.caches[cache] = Steps()
        if steps.too_early(call, room):
            return self.inner(model, **kwargs)
        compiled = None if state.uncompiled else self.compiled
        step = steps.find(model, compiled or self.inner, compiled is not None, call, room)
        if step is None:
            reason = "the form of its inputs or the memory of its cache changes too often for that to pay"
            state.say(model, reason, self.loud)
            return self.inner(model, **kwargs)
        steps.runs += 1
        ordinary = None
        try:
            step.load(call, room)
            form = call.mask is None, call.device, room.buffers[0] is not None and room.buffers[0][0].dtype
            if form not in state.checked:
                ordinary = self.inner(model, **kwargs)
                _compare(tensors_of(step.run(cache), cache), tensors_of(ordinary, cache))
                state.checked.add(form)
                return ordinary
            output = step.run(cache)
        except Exception as error:  # whatever a model's code does not stand; if it is not that, it is raised below
            kind = "" if isinstance(error, (UnfitError, WaitsError)) else f"{type(error).__name__}: "
            state.refuse(model, f"{kind}{error}".split("\n")[0], compiled is not None, self.loud)
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


def _without_self(method: Callable[..., Any], _: Any, *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)


def use_cuda_graphs(model: torch.nn.Module, compiled: bool = False) -> Handle:
    """Record the decoding steps of a model with a :class:`GrowingCache` as CUDA graphs, in ``generate`` and in loops
    that call the model with one new token a row.

    Steps that cannot be recorded run as they always did; for which model and why is said by a warning, once.

    Args:
        compiled: compile the steps with torch.compile before they are recorded: faster by a tenth or so (norms, rotary
            embeddings and the like are fused), for up to a minute at the first step and when the cache first grows.

    Returns:
        a handle that undoes it. Asked for several times, the last that was not undone counts.

    Raises:
        TypeError: if nothing in ``model`` can generate.
    """
    return ask_for_cuda_graphs(model, object(), Wish(compiled))


def ask_for_cuda_graphs(model: torch.nn.Module, owner: Any, wish: Wish) -> Handle:
    """:func:`use_cuda_graphs` in the name of ``owner``, who asks once however often it asks."""
    generators = [module for module in model.modules() if isinstance(module, GenerationMixin)]
    if not generators:
        raise TypeError(f"{type(model).__name__} cannot generate, so it has no decoding steps to record")
    for module in generators:
        _change(module, lambda asked: {**{k: v for k, v in asked.items() if k != owner}, owner: wish})
    return of_each(generators, functools.partial(_withdraw, owner=owner))


def withdraw_cuda_graphs(model: torch.nn.Module, owner: Any) -> None:
    """Undo :func:`ask_for_cuda_graphs`."""
    for module in model.modules():
        if _recorded(module.__dict__.get("forward")):
            _withdraw(module, owner)


def leave_cuda_graphs(model: torch.nn.Module) -> None:
    """Undo every :func:`use_cuda_graphs`, and free what was recorded."""
    for module in model.modules():
        if _recorded(module.__dict__.get("forward")):
            _change(module, lambda asked: {})


def _withdraw(module: torch.nn.Module, owner: Any) -> None:
    if _recorded(module.__dict__.get("forward")):
        _change(module, lambda asked: {k: v for k, v in asked.items() if k != owner})
    else:  # something else stands before ours, which lets everything through from now on
        _state(module).off = True


def recording_of(model: torch.nn.Module) -> str | None:
    """What becomes of a model's decoding steps, in a few words; None if nobody asks for recordings."""
    asked = [module for module in model.modules() if _recorded(module.__dict__.get("forward"))]
    if not asked:
        return None
    module: Any = asked[0]
    reason = _state(module).refused or why_not(module)
    compiled = module.__dict__["forward"].__func__.compiled is not None and not _state(module).uncompiled
    how = "compiled and recorded as CUDA graphs" if compiled else "recorded as CUDA graphs"
    return how if reason is None else f"not recorded as CUDA graphs: {reason}"


def _change(module: Any, change: Callable[[dict[Any, Wish]], dict[Any, Wish]]) -> None:
    """Other wishes, and with them another wrapper (copies of the model share the old one); none: its own forward."""
    own = module.__dict__.get("forward")
    if _recorded(own):
        inner, arguments, before = own.__func__.inner, own.__func__.arguments, own.__func__.asked
    else:
        arguments = Arguments(module)
        inner = type(module).forward if own is None else functools.partial(_without_self, own)
        before = {}
    asked = change(before)
    _states.pop(module, None)  # whoever asks again may have removed what was in the way
    if asked and [*asked.items()] == [*before.items()]:
        return
    if asked:
        # a method of the instance: a deep copy of the model takes it along, bound to the copy
        module.__dict__["forward"] = MethodType(RecordedForward(inner, arguments, asked), module)
    elif isinstance(inner, functools.partial):
        module.__dict__["forward"] = inner.args[0]
    else:
        del module.__dict__["forward"]


def _recorded(forward: Any) -> bool:
    return isinstance(getattr(forward, "__func__", None), RecordedForward)
