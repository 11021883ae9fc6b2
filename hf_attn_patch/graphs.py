"""Decoding steps as CUDA graphs: one launch a token instead of some forty a layer.

Decoding one token is little work in many kernels, and the host needs longer to start them than the GPU to run them. So
a step is recorded once, for one cache and one form of the inputs, and run again for each token. The model is its own:
what is recorded is its ``forward``, on a cache whose layers write at a place that is read on the device
(``step_layers.py``). Outside, nothing changes: it is the model's ``forward`` that is replaced, so ``generate`` and
loops of one's own take part, and the cache is a :class:`GrowingCache` before and after each step.

A step runs as it always did wherever it cannot be recorded: gradients, hooks, several devices, offloading, models that
look at lengths on the host, and so on. What a recorded step computes is compared with the ordinary one, once a model.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import EncoderDecoderCache, GenerationMixin
from transformers.utils import ModelOutput

from .cache import GrowingCache, _without_self
from .dispatch import _forced
from .integration import NAME
from .recording import Recording, Repetition, WaitsError, record, rehearse
from .step_layers import Place, StepRoom, advance, reserve, settle, standing_in, step_layers

logger = logging.getLogger("hf_attn_patch")

DEVICES = {"cuda"}
REHEARSALS = 1  # steps that run unrecorded first
MOST_STEPS = 4  # recordings kept for one cache
PAYS = 8  # runs that a recording must have served on average, after the first few
CONSTANT = 1 << 18  # inputs of more elements are used where they are, not copied
MASK_STEP = 1024  # columns that a mask grows by where no buffer says how long it can get

_inside = threading.local()


class UnfitError(Exception):
    """A step that cannot be recorded, with the reason."""


class PromptError(UnfitError):
    """Not one token a row: no decoding step at all."""


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
        if "_hf_hook" in module.__dict__ or (module is not model and _hooked(module)):
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
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


class Step:
    """One form of a decoding step for one cache: the memory of its inputs, and its recording."""

    def __init__(self, model: torch.nn.Module, inner: Callable[..., Any], call: Call, room: StepRoom) -> None:
        self.model, self.inner = weakref.ref(model), inner
        self.room, self.device = room, call.device
        self.place = Place(call.device)
        self.kwargs = dict(call.kwargs)
        self.copied: dict[str, Tensor] = {}
        for name, value in call.copied.items():
            self.copied[name] = self.kwargs[name] = torch.empty_like(value, memory_format=torch.contiguous_format)
        self.mask: Tensor | None = None
        if call.mask is not None:
            ends = [b[0].shape[2] for b, sliding in zip(room.buffers, room.sliding, strict=True) if b and not sliding]
            longest = max(ends, default=(call.mask.shape[1] // MASK_STEP + 2) * MASK_STEP)
            self.mask = self.kwargs[call.mask_name] = call.mask.new_zeros(call.mask.shape[0], longest)
        self.kwargs.pop("past_key_values")
        self.runs = 0
        self.recording: Recording | Repetition | None = None

    def fits(self, call: Call, room: StepRoom) -> bool:
        """Whether it writes to the cache's memory as it is now, and the mask has room."""
        return self.room.same_buffers(room) and (self.mask is None or call.mask.shape[1] <= self.mask.shape[1])

    def load(self, call: Call, room: StepRoom) -> None:
        """Put a call's inputs where the step reads them."""
        for name, value in call.copied.items():
            self.copied[name].copy_(value)
        if self.mask is not None:
            self.mask[:, : call.mask.shape[1]].copy_(call.mask)
        self.place.set(room.position, room.slot)

    def work(self, cache: Any) -> Any:
        """The step itself, on the step's own memory; leaves the cache as it found it, but for K and V."""
        growing = _growing(cache)
        with standing_in(growing, step_layers(growing, self.room, self.place)):
            output = self.inner(self.model(), **self.kwargs, past_key_values=cache)
        self.place.advance()
        return _map(output, lambda t: t, cache, _CACHE)

    def run(self, cache: Any) -> Any:
        """Run the step on what was loaded: unrecorded at first, then recorded."""
        if self.recording is None:
            if self.runs < REHEARSALS:
                result = rehearse(functools.partial(self.work, cache), self.device)
            else:
                held = weakref.ref(cache)
                self.recording = record(lambda: self.work(held()), self.device)
        if self.recording is not None:
            result = self.recording.replay()
        self.runs += 1
        self.place.advanced()
        constants = {id(t) for t in self.kwargs.values() if isinstance(t, Tensor)}
        # a copy: the next run writes to the same memory
        return _map(result, lambda t: t if id(t) in constants else t.clone(), _CACHE, cache)


_CACHE = object()  # stands for the cache in a result that is kept, which must not keep the cache


def _growing(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _map(value: Any, function: Callable[[Tensor], Tensor], old: Any, new: Any) -> Any:
    """A model's output with ``function`` of its tensors, and ``new`` for ``old``."""
    if value is old:
        return new
    if isinstance(value, Tensor):
        return function(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, ModelOutput):
        return type(value)(**{k: _map(v, function, old, new) for k, v in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_map(v, function, old, new) for v in value)
    if type(value) is dict:
        return {k: _map(v, function, old, new) for k, v in value.items()}
    raise UnfitError(f"it returns a {type(value).__name__}")


def _tensors(output: Any, cache: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(output, lambda t: found.append(t) or t, cache, None)  # type: ignore[func-returns-value]
    return found


class Call:
    """The arguments of one decoding step, sorted: what is copied, what is used where it is, what must stay the same.

    Raises:
        UnfitError: this call is not a step that can be recorded.
    """

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            if len(args) > 1 or model.main_input_name in kwargs:
                raise UnfitError("positional arguments")
            kwargs = {model.main_input_name: args[0], **kwargs}
        self.kwargs = kwargs
        self.copied: dict[str, Tensor] = {}
        cache = kwargs.get("past_key_values")
        if kwargs.get("use_cache") is False or type(_growing(cache)) is not GrowingCache:
            raise UnfitError("no growing cache")
        decoder = "decoder_input_ids" if isinstance(cache, EncoderDecoderCache) else "input_ids"
        ids = kwargs.get(decoder)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
            raise PromptError("more than one token")
        self.device = ids.device
        self.mask_name = "decoder_attention_mask" if decoder == "decoder_input_ids" else "attention_mask"
        self.mask: Any = kwargs.get(self.mask_name)
        if self.mask is not None and (
            not isinstance(self.mask, Tensor) or self.mask.dim() != 2 or self.mask.device != self.device
        ):
            raise UnfitError("a mask of its own")
        signature: list[Any] = []
        for name, value in kwargs.items():
            if name == "past_key_values":
                continue
            if name == self.mask_name and value is not None:
                signature.append((name, value.shape[0], value.dtype))
            elif isinstance(value, Tensor) and value.numel() <= CONSTANT:
                if value.requires_grad or value.device != self.device:
                    raise UnfitError(f"{name} on another device")
                self.copied[name] = value
                signature.append((name, value.shape, value.dtype))
            else:
                signature.append((name, _constant(name, value)))
        if isinstance(cache, EncoderDecoderCache):
            signature.append(_cross(cache))
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise UnfitError("more outputs than the last")
        device = self.device.type
        if torch.is_autocast_enabled(device) or (device == "cuda" and torch.cuda.is_current_stream_capturing()):
            raise UnfitError("autocast keeps copies of weights, and a recording does not go into another")
        signature += [
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            _forced[-1] if _forced else None,
            torch.cuda.current_stream(self.device).cuda_stream if device == "cuda" else None,
        ]
        self.signature = tuple(signature)


def _constant(name: str, value: Any) -> Any:
    """What must be the same for a recorded step to be the right one."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    if isinstance(value, (ModelOutput, tuple, list)):
        values = value.values() if isinstance(value, ModelOutput) else value
        return tuple(_constant(name, v) for v in values)
    raise UnfitError(f"{name} is a {type(value).__name__}")


def _cross(cache: EncoderDecoderCache) -> Any:
    """The keys and values of cross-attention: they must be there, and stay where they are."""
    if not cache.is_updated or not all(cache.is_updated.values()):
        raise UnfitError("the encoder's keys are not cached yet")
    return tuple(
        _constant("cross-attention", (layer.keys, layer.values)) for layer in cache.cross_attention_cache.layers
    )


class Steps:
    """The recorded steps of one cache."""

    def __init__(self) -> None:
        self.known: dict[Any, Step] = {}
        self.recorded = self.runs = 0

    def find(self, model: Any, inner: Callable[..., Any], call: Call, room: StepRoom) -> Step | None:
        """The step for a call, made if there is none; None if recording does not pay for this cache."""
        step = self.known.get(call.signature)
        if step is not None and step.fits(call, room):
            return step
        if self.recorded >= MOST_STEPS and self.runs < PAYS * self.recorded:
            return None
        self.forget_other_rooms(room)
        if len(self.known) >= MOST_STEPS:
            self.known.pop(next(iter(self.known)))
        settle(room)
        step = self.known[call.signature] = Step(model, inner, call, room)
        self.recorded += 1
        return step

    def forget_other_rooms(self, room: StepRoom) -> None:
        """Steps for buffers that the cache has left would keep those alive."""
        self.known = {k: s for k, s in self.known.items() if s.room.same_buffers(room)}

    def forget(self) -> None:
        self.known.clear()


class ModelState:
    """What is known of one model: whether its steps can be recorded, and those that are."""

    def __init__(self) -> None:
        self.hooks = -1
        self.reason: str | None = None
        self.refused: str | None = None
        self.checked: set[Any] = set()
        self.caches: weakref.WeakKeyDictionary[Any, Steps] = weakref.WeakKeyDictionary()

    def allows(self, model: Any) -> bool:
        """Asks the model again only where something may have been hooked in since."""
        if self.refused is not None or model.config._attn_implementation != NAME:
            return False
        if self.hooks != RemovableHandle.next_id:
            self.hooks = RemovableHandle.next_id
            self.reason = why_not(model)
        return self.reason is None

    def refuse(self, model: torch.nn.Module, reason: str) -> None:
        """Once and for all: the model goes on as it always did."""
        self.refused = reason
        self.caches.clear()
        logger.info("decoding steps of %s are not recorded as CUDA graphs: %s", type(model).__name__, reason)


_states: weakref.WeakKeyDictionary[torch.nn.Module, ModelState] = weakref.WeakKeyDictionary()


def _state(model: torch.nn.Module) -> ModelState:
    if model not in _states:
        _states[model] = ModelState()
    return _states[model]


class RecordedForward:
    """Stands before a model's ``forward``: decoding steps are recorded and run again, everything else goes through."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner
        functools.update_wrapper(self, inner)

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or model.training
            or getattr(_inside, "busy", False)
            or kwargs.get("past_key_values") is None
        ):
            return self.inner(model, *args, **kwargs)
        _inside.busy = True
        try:
            return self._step(model, args, kwargs)
        finally:
            _inside.busy = False

    def _step(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache, state = kwargs["past_key_values"], _state(model)
        steps = state.caches.get(cache)
        if not state.allows(model):
            return self.inner(model, *args, **kwargs)
        try:
            call = Call(model, args, kwargs)
        except UnfitError as error:
            if isinstance(error, PromptError):  # whatever else changed with it: what follows is recorded anew
                state.hooks = -1
                if steps is not None:
                    steps.forget()
            return self.inner(model, *args, **kwargs)
        room = reserve(_growing(cache))
        if room is None:
            return self.inner(model, *args, **kwargs)
        if steps is None:
            steps = state.caches[cache] = Steps()
        step = steps.find(model, self.inner, call, room)
        if step is None:
            return self.inner(model, *args, **kwargs)
        steps.runs += 1
        ordinary = None
        try:
            step.load(call, room)
            form = call.mask is None, call.device, room.buffers[0] is not None and room.buffers[0][0].dtype
            if form not in state.checked:
                ordinary = self.inner(model, *args, **kwargs)
                _compare(_tensors(step.run(cache), cache), _tensors(ordinary, cache))
                state.checked.add(form)
                return ordinary
            output = step.run(cache)
        except Exception as error:  # whatever a model's code does not stand; if it is not that, it is raised below
            kind = "" if isinstance(error, (UnfitError, WaitsError)) else f"{type(error).__name__}: "
            state.refuse(model, f"{kind}{error}".split("\n")[0])
            return self.inner(model, *args, **kwargs) if ordinary is None else ordinary
        advance(_growing(cache))
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


def use_cuda_graphs(model: torch.nn.Module) -> Callable[[], None]:
    """Record the decoding steps of a model with a :class:`GrowingCache` as CUDA graphs, in ``generate`` and in loops
    that call the model with one new token a row.

    Steps that cannot be recorded run as they always did; for which model and why is logged once, at INFO.

    Returns:
        a function that undoes it.

    Raises:
        TypeError: if nothing in ``model`` can generate.
    """
    generators = [module for module in model.modules() if isinstance(module, GenerationMixin)]
    if not generators:
        raise TypeError(f"{type(model).__name__} cannot generate, so it has no decoding steps to record")
    for module in generators:
        own = module.__dict__.get("forward")
        if not _recorded(own):
            inner = type(module).forward if own is None else functools.partial(_without_self, own)
            # a method of the instance: a deep copy of the model takes it along, bound to the copy
            module.__dict__["forward"] = MethodType(RecordedForward(inner), module)
        _states.pop(module, None)
    return functools.partial(leave_cuda_graphs, model)


def _recorded(forward: Any) -> bool:
    return isinstance(getattr(forward, "__func__", None), RecordedForward)


def leave_cuda_graphs(model: torch.nn.Module) -> None:
    """Undo :func:`use_cuda_graphs`, and free what was recorded."""
    for module in model.modules():
        own = module.__dict__.get("forward")
        if own is not None and _recorded(own):
            inner = own.__func__.inner
            if isinstance(inner, functools.partial):
                module.__dict__["forward"] = inner.args[0]
            else:
                del module.__dict__["forward"]
            _states.pop(module, None)
