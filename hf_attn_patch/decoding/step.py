"""One decoding step as it is recorded: its inputs' memory, what must stay the same, and the steps of one cache."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.utils import ModelOutput

from hf_attn_patch.attn.choice import asked_for
from hf_attn_patch.cache.growing_cache import GrowingCache
from hf_attn_patch.compat.torch import any_length

from . import fusing, remembered
from .capture import Recording, Repetition, not_collecting, record, rehearse
from .fusing import Fused
from .outputs import CACHE, UnfitError, map_output, tensors_of
from .step_layers import StepRoom, TokenPlace, settle, standing_in, step_layers
from .tape import Tape

REHEARSALS = 1  # steps that run unrecorded first, watched for what cannot be recorded
COMPILATIONS = 1  # steps before those, of a compiled model: compiling waits for the device
MOST_STEPS = 4  # recordings kept for one cache
PAYS = 8  # runs that a recording must have served on average, after the first few
WARM = 1  # steps after a prompt that run unrecorded: an answer of a word or two is over before a recording pays
SHORT = 8  # nor does it pay for fewer steps than these, where their number is known
FUSED_SHORT = 96  # nor to write a step down for fewer than these: it takes what some 70 fused steps save
CONSTANT = 1 << 18  # inputs of more elements are used where they are, not copied
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
        pays = not 0 <= room.expected - room.position < FUSED_SHORT
        self.fuses = fuses and pays and not compiled and fusing.can_fuse(call.device)
        self.tokens_form = call.tokens.shape, call.device
        self.tape: Tape | None = None  # while the step is written down
        self.written: Any = None  # the output of the forward that was written down
        self.fused: Fused | None = None
        self.remembered = False  # it was not written down for this call
        if self.fuses:
            self.form = call.signature, room.form(), *map(_tensor_form, self._tensors())
            self._recall(model)

    def _tensors(self) -> list[Tensor | None]:
        """What another call of the same form has others of."""
        return [*self.copied.values(), self.mask, *self.place.tensors, *self.room.tensors()]

    def _recall(self, model: torch.nn.Module) -> None:
        """What is known of steps of this form: fewer kernels, or why not."""
        if type(model).forward is not self.inner:  # somebody has put another forward in its place
            return
        if reason := remembered.reason_for(model, self.form):
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

    def launch(self, cache: Any) -> Any:
        """Start the step: unrecorded at first, then recorded. What it gives is overwritten by the next one."""
        if self.recording is None:
            if self.runs < self.unwatched + REHEARSALS and not self.remembered:
                result = self._rehearsed(cache)
            else:
                self.recording = self._recorded(weakref.ref(cache))
        if self.recording is not None:
            result = self.recording.replay()
        self.runs += 1
        self.place.advanced()
        return result

    def _rehearsed(self, cache: Any) -> Any:
        """The step, unrecorded; written down, if it is to have fewer kernels."""
        with not_collecting() if self.fuses else contextlib.nullcontext():  # some ten thousand objects, for a moment
            self.tape = self._new_tape() if self.fuses else None
            result = rehearse(functools.partial(self.work, cache), self.device, self.runs >= self.unwatched)
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
                remembered.keep(model, self.form, self.fused, self._tensors(), tape.slot_of)
        except Exception as error:  # a model may run anything; nothing is lost but speed
            self._not_fused(model, error)
        self.written = None

    def _recorded(self, held: weakref.ref[Any]) -> Recording | Repetition:
        """The step, recorded; as it is where its fewer kernels cannot be."""
        try:
            return record(lambda: self.work(held()), self.device)
        except Exception as error:
            model = self.model()
            if self.fused is None or model is None:
                raise
            self.fused = None
            self._not_fused(model, error)
            return record(lambda: self.work(held()), self.device)

    def _not_fused(self, model: torch.nn.Module, error: Exception) -> None:
        """Say why, and try no other step of this form."""
        reason = fusing.told[model] = _one_line(error)
        if not isinstance(error, torch.OutOfMemoryError):
            remembered.keep_reason(model, self.form, reason)


def _tensor_form(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def _one_line(error: Exception) -> str:
    kind = "" if isinstance(error, UnfitError) else f"{type(error).__name__}: "
    return f"{kind}{error}".split("\n")[0]


def growing_of(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


class StepCall:
    """The arguments of one decoding step, sorted: what is copied, what is used where it is, what must stay the same.

    Raises:
        UnfitError: this call is not a step that can be recorded.
    """

    def __init__(self, kwargs: dict[str, Any], cache_name: str) -> None:
        self.kwargs, self.cache_name = kwargs, cache_name
        self.copied: dict[str, Tensor] = {}
        cache = kwargs[cache_name]
        growing = growing_of(cache)
        if type(growing) is not GrowingCache:
            raise UnfitError(f'its cache is a {type(growing).__name__} and no GrowingCache: enable(cache="growing")')
        tokens = new_tokens(kwargs, cache)
        if tokens is None:
            raise UnfitError("it is given neither ids nor embeddings")
        self.device, self.tokens = tokens.device, tokens
        self.tokens_name = next(name for name, value in kwargs.items() if value is tokens)
        decoder = "decoder_" if isinstance(cache, EncoderDecoderCache) else ""
        self.mask_name = f"{decoder}attention_mask"
        self.mask: Any = kwargs.get(self.mask_name)
        if self.mask is not None and (
            not isinstance(self.mask, Tensor) or self.mask.dim() != 2 or self.mask.device != self.device
        ):
            raise UnfitError(f"its {self.mask_name} is not [B, S] on its tokens' device")
        if self.mask is None and isinstance(cache, EncoderDecoderCache):
            # these decoders would make one themselves, from a length on the host
            seen = growing_of(cache).get_seq_length()
            self.mask = torch.ones(tokens.shape[0], seen + 1, dtype=torch.int64, device=self.device)
            kwargs = self.kwargs = {**kwargs, self.mask_name: self.mask}
        signature: list[Any] = []
        for name, value in kwargs.items():
            if name == cache_name:
                continue
            if name == self.mask_name and value is not None:
                signature.append((name, value.shape[0], value.dtype))
            elif isinstance(value, Tensor) and (value.numel() <= CONSTANT or value is tokens):
                if value.requires_grad or value.device != self.device:
                    raise UnfitError(f"{name} is on another device than its tokens, or needs a gradient")
                self.copied[name] = value
                signature.append((name, value.shape, value.dtype))
            else:
                signature.append((name, _constant(name, value)))
        if isinstance(cache, EncoderDecoderCache):
            signature.append(_cross(cache))
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise UnfitError("output_attentions and output_hidden_states are not recorded")
        device = self.device.type
        if torch.is_autocast_enabled(device) or (device == "cuda" and torch.cuda.is_current_stream_capturing()):
            raise UnfitError("autocast keeps copies of weights, and a recording does not go into another")
        signature += [
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            asked_for(),
            torch.cuda.current_stream(self.device).cuda_stream if device == "cuda" else None,
        ]
        self.signature = tuple(signature)


def new_tokens(kwargs: dict[str, Any], cache: Any) -> Tensor | None:
    """The ids [B, S] or embeddings [B, S, E] that a call with a cache brings."""
    decoder = "decoder_" if isinstance(cache, EncoderDecoderCache) else ""
    for name in ("input_ids", "inputs_embeds"):
        tokens = kwargs.get(decoder + name)
        if isinstance(tokens, Tensor) and tokens.dim() > 1:
            return tokens
    return None


def is_prompt(kwargs: dict[str, Any], cache: Any) -> bool:
    """Whether a call is no decoding step: not one token a row, or none before it."""
    tokens = new_tokens(kwargs, cache)
    if (tokens is not None and tokens.shape[1] != 1) or kwargs.get("use_cache") is False:
        return True
    layers = getattr(growing_of(cache), "layers", None)
    return layers is not None and not any(getattr(layer, "is_initialized", True) for layer in layers)


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
