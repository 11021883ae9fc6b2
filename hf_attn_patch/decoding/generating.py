"""``generate`` with its tokens chosen inside recorded steps, several of which are in flight before the host looks.

transformers' loop chooses each token on the host's command: processors, criteria and the question whether all rows have
ended take as long as a small step, and the device waits. Here ``generate`` is transformers' own up to its loop, which
it lets be replaced (``custom_generate``). The prompt and the first tokens go through it as ever; then steps that choose
by themselves (``flight.py``) run until the buffers are full or the call is over. The tokens are the same.

What needs each token as it comes (unknown processors and criteria, scores that are to be returned, ...) goes through
transformers' loop as before.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput
from transformers.generation.configuration_utils import GenerationMode

from hf_attn_patch.cache.growing_cache import GrowingCache
from hf_attn_patch.compat.cache_keyword import NAMES, keyword_of
from hf_attn_patch.compat.calls import cache_of
from hf_attn_patch.compat.generation import (
    decodes_like_all,
    decoding_context,
    next_arguments_of,
    one_by_one,
    prefill_of,
    processes_step_together,
)
from hf_attn_patch.compat.torch import forward_hooks
from hf_attn_patch.compat.transformers import captures_outputs

from . import remembered
from .flight import ChoosingStep, Flight, Landing, moving_names
from .next_token import NextToken
from .outputs import UnfitError, reason_of
from .recorded_forward import forget_steps, recorder_of, state_of
from .step import SHORT, WARM
from .step_call import growing_of

logger = logging.getLogger("hf_attn_patch")

#: what ``generate`` takes that its replaceable loop is not given, or that means another way of decoding
_NOT_HANDED_ON = ("custom_generate", "assistant_model", "assistant_tokenizer", "tokenizer", "synced_gpus")
_EACH_STEP = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
GENERATE = "generate"


@dataclass(eq=False)
class GenerateAhead:
    """Stands before a model's ``generate``. No function, so that copies and pickles of the model take it along."""

    model: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generate = type(self.model).generate
        given = {**dict(zip(_positional(generate), args, strict=False)), **kwargs}
        if not getattr(given.get("generation_config"), "is_assistant", False):  # which goes on in the same call
            for name in NAMES:
                forget_steps(self.model, given.get(name))
        if not self._may_fly(given):
            return generate(self.model, *args, **kwargs)
        decode = functools.partial(generate_ahead, streamer=given.get("streamer"))
        return generate(self.model, *args, **{**kwargs, "custom_generate": decode})

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).generate.__get__(self.model))

    def _may_fly(self, given: dict[str, Any]) -> bool:
        model, recorder = self.model, recorder_of(self.model)
        if recorder is None or model.training or any(given.get(name) is not None for name in _NOT_HANDED_ON):
            return False
        if not all(map(captures_outputs, forward_hooks(model))):  # of the model itself: they see each token's call
            return False
        if given.get("synced_gpus") is None and processes_step_together(
            model
        ):  # not said to a loop that replaces theirs
            return False
        state = state_of(model)
        if state.chooses_outside or state.off or state.why_not(model, recorder.why_not, anew=True) is not None:
            return False
        return _mode(model, given) in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@functools.lru_cache(64)
def _positional(generate: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(generate).parameters)[1:]


def _mode(model: Any, given: dict[str, Any]) -> Any:
    """The way of decoding that a call of ``generate`` asks for: by its arguments, its config, the model's config."""
    merged = copy.copy(model.generation_config)
    theirs = given.get("generation_config")
    asked = {} if theirs is None else vars(theirs)
    for source in (asked, given):
        for name, value in source.items():
            if value is not None and name in vars(merged):
                setattr(merged, name, value)
    return GenerationConfig.get_generation_mode(merged, given.get("assistant_model"))


def stand_before_generate(model: Any) -> None:
    """Put a :class:`GenerateAhead` before a model's ``generate``, if that is the one that all have."""
    if GENERATE not in model.__dict__ and decodes_like_all(model):
        model.__dict__[GENERATE] = GenerateAhead(model)


def leave_generate(model: Any) -> None:
    """Undo :func:`stand_before_generate`."""
    if isinstance(model.__dict__.get(GENERATE), GenerateAhead):
        del model.__dict__[GENERATE]


def generate_ahead(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """A loop for ``generate(custom_generate=...)``: the arguments and the result of transformers' own."""
    try:
        how = NextToken(logits_processor, stopping_criteria, generation_config)
        _refuse(model, input_ids, generation_config, synced_gpus, model_kwargs)
    except UnfitError as error:
        _say(model, str(error))
        how = None
    if how is None or how.last - input_ids.shape[1] < SHORT + WARM:
        return one_by_one(model)(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
    call = _Call(model, input_ids, model_kwargs, how, streamer)
    call.run(logits_processor, stopping_criteria, generation_config)
    return call.result(generation_config)


def _refuse(model: Any, ids: Tensor, config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    cache = cache_of(model_kwargs)
    if type(growing_of(cache)) is not GrowingCache or not config.use_cache:
        raise UnfitError(f"its cache is a {type(growing_of(cache)).__name__} and no GrowingCache")
    if any(getattr(config, name, None) for name in _EACH_STEP):
        raise UnfitError("scores, logits, attentions or hidden states of each step are to be returned")
    if synced_gpus or getattr(config, "is_assistant", False):
        raise UnfitError("another model or process waits for each token")
    if ids.device != model.device:
        raise UnfitError("its ids are on another device than the model")
    parameters = inspect.signature(next_arguments_of(model)).parameters
    if "num_new_tokens" not in parameters:
        raise UnfitError("it has a way of its own to go on from a token")


def _say(model: Any, reason: str) -> None:
    said = state_of(model).said
    if reason not in said:
        said.add(reason)
        logger.info("tokens of %s are chosen outside its recorded steps: %s", type(model).__name__, reason)


class _Call:
    """One call of ``generate``: its ids [B, S], the model's arguments, and which rows are unfinished."""

    def __init__(self, model: Any, ids: Tensor, arguments: dict[str, Any], how: NextToken, streamer: Any) -> None:
        self.model, self.ids, self.arguments, self.how, self.streamer = model, ids, arguments, how, streamer
        self.unfinished = torch.ones(ids.shape[0], dtype=torch.int64, device=ids.device)
        self.steps, self.over, self.grounded = 0, False, False
        self.unseen = False  # whether rows ended with the last token is not known to the host yet
        self.wrong: Tensor | None = None  # on the device: whether arguments move in another way than they did before
        self.doubted = False
        self.output: Any = None

    def run(self, processors: Any, criteria: Any, config: Any) -> None:
        """To the end of the call."""
        model = self.model
        self.output = output = prefill_of(model)(self.ids, config, self.arguments, is_first_iteration=True)
        with decoding_context(model):
            self.take(output, processors, criteria, look=not self._may_fly_at_once())
            while not self.over:
                inputs = self.inputs(self.ids, self.arguments)
                if self.fly(inputs, criteria) or self._look():
                    continue
                output = model(**inputs)
                self.steps += 1
                self.take(output, processors, criteria)
                self.output = output
        if self.streamer is not None:
            self.streamer.end()

    def inputs(self, ids: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        """The model's arguments for the last of the ids."""
        made = self.model.prepare_inputs_for_generation(ids, next_sequence_length=1, **arguments)
        return {**made, "return_dict": True}

    def after(self, output: Any, arguments: dict[str, Any], tokens: int) -> dict[str, Any]:
        """The arguments when so many tokens have come."""
        encoder_decoder = self.model.config.is_encoder_decoder
        return next_arguments_of(self.model)(
            output, arguments, is_encoder_decoder=encoder_decoder, num_new_tokens=tokens
        )

    def take(self, output: Any, processors: Any, criteria: Any, look: bool = True) -> None:
        """Choose a token of each row as transformers' loop does, from the output of an ordinary step.

        Args:
            look: wait for it; else the next step is made ready while the device is at work.
        """
        self.arguments = self.after(output, self.arguments, 1)
        logits = output.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = processors(self.ids, logits)
        if self.how.sampling:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(scores, dim=-1)
        if self.how.pad is not None:
            tokens = tokens * self.unfinished + self.how.pad.to(tokens.device) * (1 - self.unfinished)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        self.unfinished = self.unfinished & ~criteria(self.ids, None)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        self.unseen = True
        if look:
            self._look()

    def _look(self) -> bool:
        """Whether all is over after the last token; waits for the device, if the host has not looked before."""
        if self.unseen:
            self.unseen = False
            self.over = bool(self.unfinished.max() == 0)
        return self.over

    def _stops(self) -> bool:
        """Whether a flight that is ready must not begin: all is over, or it would not be right."""
        if self.wrong is not None:
            wrong, self.wrong = self.wrong, None
            self.doubted = bool(wrong)
        return self._look() or self.doubted

    def fly(self, inputs: dict[str, Any], criteria: Any) -> bool:
        """As many steps as may be in a row; False if none, and the next one is an ordinary one."""
        left = self.how.last - self.ids.shape[1]
        if self.grounded or left < SHORT or self.ids.shape[1] <= self.how.first:
            return False
        if self.steps < WARM and not self._may_fly_at_once():
            return False
        recorder, state = recorder_of(self.model), state_of(self.model)
        if recorder is None:
            return False
        try:
            flight = self._flight(recorder, state, inputs, left)
        except UnfitError as error:
            _say(self.model, str(error))
            self.grounded = True
            return False
        if flight is None:
            return False
        landing: Landing = recorder.alone(flight.run)
        self._land(flight, landing, criteria)
        if landing.error is not None:
            state.chooses_outside = True
            state.caches.clear()
            _say(self.model, reason_of(landing.error))
            self.grounded = True
        return landing.steps > 0 or self.over

    def _may_fly_at_once(self) -> bool:
        """Whether a step may be remembered, so that to record it takes no longer than an ordinary one; and the prompt's
        output, which is kept meanwhile, is small."""
        return remembered.any_of(self.model) and self.output.logits.shape[1] == 1

    def _flight(self, recorder: Any, state: Any, inputs: dict[str, Any], left: int) -> Flight | None:
        found = recorder.fitting(self.model, state, inputs)
        if found is None:
            return None
        call, room, steps = found
        if recorder.form(call, room) not in state.checked:  # an ordinary step finds out whether recorded ones are right
            return None
        if call.mask is not None and call.mask.shape[1] != room.position + 1:
            raise UnfitError(f"its {call.mask_name} is not as long as its cache")
        ids = torch.cat([self.ids, self.ids[:, -1:]], dim=-1)
        then = self.inputs(ids, self.after(self.output, dict(self.arguments), 1))
        guess = None if self.doubted else remembered.moving_of(self.model, inputs)
        moving, self.wrong = moving_names(inputs, then, call, guess)
        if guess is None:
            remembered.keep_moving(self.model, inputs, moving)
        make = functools.partial(
            ChoosingStep,
            *recorder.making(self.model, state, call, room),
            how=self.how,
            vocabulary=self.output.logits.shape[-1],
            moving=moving,
        )
        step = steps.find(call, room, make, key=(self.how, moving))
        if step is None:
            raise UnfitError("its memory changes too often for that to pay")
        assert isinstance(step, ChoosingStep)
        if self.steps < WARM and not step.remembered:  # it would have to be written down, or rehearsed
            return None
        step.begin(call, room, self.ids, self.unfinished)
        most = min(left, step.steps_left(room))
        cache = call.kwargs[call.cache_name]
        return Flight(step, cache, most, self._seen, self._stops) if most > 0 else None

    def _seen(self, tokens: list[int]) -> None:
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens))

    def _land(self, flight: Flight, landing: Landing, criteria: Any) -> None:
        choosing, n = flight.step.choosing, landing.steps
        self.ids = torch.cat([self.ids, choosing.tokens[:, :n]], dim=-1)
        self.steps += n
        if n:
            self.arguments = self.after(self.output, self.arguments, n)
        if self.how.eos is not None:  # a row is finished from its first such token on
            ended = torch.isin(choosing.tokens[:, :n], self.how.eos.to(self.ids.device)).any(1)
            self.unfinished = self.unfinished & ~ended
        criteria(self.ids[:, -1:].expand(-1, self.ids.shape[1]), None)  # says a word about lengths past the model's
        self.over |= landing.stopped or self.ids.shape[1] >= self.how.max_length

    def result(self, config: Any) -> Any:
        """What transformers' loop returns."""
        if not config.return_dict_in_generate:
            return self.ids
        kind: Any = GenerateEncoderDecoderOutput if self.model.config.is_encoder_decoder else GenerateDecoderOnlyOutput
        return kind(sequences=self.ids, **{keyword_of(kind): cache_of(self.arguments)})
