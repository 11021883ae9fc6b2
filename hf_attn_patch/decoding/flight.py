"""Decoding steps that choose their token themselves, and many of them in flight before the host looks at one.

A step that is recorded runs on the device alone, so the host may start the next one before it knows what this one
chose: all that a next step needs (the token, its position, its column of the mask, who is unfinished) the step before
leaves in its memory. The host looks at a step's tokens some launches later, on a copy that travels meanwhile, and finds
out late that all rows have ended. What was started after that is as if it had not been: the cache does not count its
keys, its tokens are not taken, and the random generator goes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .next_token import Choosing, NextToken
from .outputs import UnfitError
from .step import Step
from .step_call import StepCall, growing_of
from .step_layers import StepRoom, advance

IN_FLIGHT = 2  # steps that are started before the host looks at the one before them


class ChoosingStep(Step):
    """A step that goes on from what the one before it chose.

    Args:
        model, inner, compiled, fuses, call, room: as of a :class:`Step`.
        how: how tokens are chosen.
        vocabulary: V, of the model's logits [B, 1, V].
        moving: the names of the arguments that grow by one with each token (positions).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inner: Callable[..., Any],
        compiled: bool,
        fuses: bool,
        call: StepCall,
        room: StepRoom,
        *,
        how: NextToken,
        vocabulary: int,
        moving: tuple[str, ...],
    ) -> None:
        super().__init__(model, inner, compiled, fuses, call, room)
        self.tokens_name, self.moving = call.tokens_name, moving
        self.choosing = Choosing(how, vocabulary, call.tokens, self.steps_left(room))

    def steps_left(self, room: StepRoom) -> int:
        """How many steps fit into the memory, from ``room`` on."""
        most = min(one.capacity - one.end for one in room.rooms if one is not None)
        return most if self.mask is None else min(most, self.mask.shape[1] - room.position)

    def begin(self, call: StepCall, room: StepRoom, ids: Tensor, unfinished: Tensor) -> None:
        """Load a call's inputs, after ``ids [B, S]`` of which the last is the token of ``call``."""
        if self.mask is not None:
            self.mask.zero_()  # what an earlier flight left behind its end
        self.load(call, room)
        self.choosing.load(ids, unfinished)

    def work(self, cache: Any) -> None:
        """The model's step, the choice, and what the next step starts from."""
        if self.mask is not None:
            self.mask.index_fill_(1, self.place.indices[0], 1)
        output = self.forward(cache)
        chosen = self.choosing.choose(output.logits[:, -1])
        self.copied[self.tokens_name].copy_(chosen[:, None])
        for name in self.moving:
            self.copied[name].add_(1)
        self.place.advance()


class Looks:
    """What steps tell the host, on its way: sent behind each of them, and received in order, later."""

    def __init__(self, like: Tensor, most: int) -> None:
        self.cuda = like.device.type == "cuda"
        self.free = [torch.empty_like(like, device="cpu", pin_memory=self.cuda) for _ in range(most)]
        self.sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self.sent)

    def send(self, look: Tensor) -> None:
        """A copy of ``look`` as the steps started so far leave it."""
        here = self.free.pop()
        here.copy_(look, non_blocking=True)
        event = None
        if self.cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(look.device))
        self.sent.append((here, event))

    def receive(self) -> list[int]:
        """The oldest that was sent; waits for it."""
        here, event = self.sent.popleft()
        if event is not None:
            event.synchronize()
        self.free.append(here)
        return here.tolist()


@dataclass
class Landing:
    """What a flight came to: the tokens a row that are taken, whether the call is over, what ended it early."""

    steps: int
    stopped: bool
    error: Exception | None = None


class Flight:
    """Steps from ``room`` on, many at a time.

    Args:
        step: begun.
        cache: of the call.
        most: how many steps at most.
        seen: called with the tokens of each step, a list of B, in order.
        stops: asked before the first step, when all is ready: whether there is to be none.
    """

    def __init__(
        self,
        step: ChoosingStep,
        cache: Any,
        most: int,
        seen: Callable[[list[int]], None],
        stops: Callable[[], bool],
    ) -> None:
        self.step, self.cache, self.most, self.seen, self.stops = step, cache, most, seen, stops
        self.how = step.choosing.how
        self.looks = Looks(step.choosing.look, IN_FLIGHT + 1)
        #: the random generator before each step that the host has not looked at
        self.generator: deque[Tensor] = deque()
        self.taken = 0

    def run(self) -> Landing:
        """Fly; the cache holds afterwards what was taken, and nothing else.

        Raises:
            RuntimeError: scores were NaN while sampling, as torch.multinomial says it.
        """
        error: Exception | None = None
        try:
            self.step.prepare(self.cache)
        except Exception as problem:  # as below
            error = problem
        if error is not None or self.stops():
            return Landing(0, False, error)
        stopped = False
        try:
            for _ in range(self.most):
                self._keep_generator()
                try:
                    self.step.launch(self.cache)
                except Exception as problem:  # whatever a model's code does not stand; the caller goes on without us
                    error = problem
                    break
                self.looks.send(self.step.choosing.look)
                if len(self.looks) > IN_FLIGHT and (stopped := self._look()):
                    break
            while self.looks and not stopped:
                stopped = self._look()
            if self.generator and self.how.sampling:
                self._set_generator(self.generator[0])
        finally:
            advance(growing_of(self.cache), self.taken)
        return Landing(self.taken, stopped, None if stopped else error)

    def _look(self) -> bool:
        """Take the oldest step's tokens; whether the call ends with them."""
        *tokens, going_on, broken = self.looks.receive()
        if broken:
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        self.taken += 1
        self.generator.popleft()
        self.seen(tokens)
        return (going_on == 0 and self.how.eos is not None) or self.how.out_of_time()

    def _keep_generator(self) -> None:
        device = self.step.device
        if not self.how.sampling:
            self.generator.append(self.step.choosing.look)  # nothing to go back to
        elif device.type == "cuda":
            self.generator.append(torch.cuda.get_rng_state(device))
        else:
            self.generator.append(torch.get_rng_state())

    def _set_generator(self, state: Tensor) -> None:
        if self.step.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.step.device)
        else:
            torch.set_rng_state(state)


def moving_names(
    now: dict[str, Any], then: dict[str, Any], call: StepCall, guess: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], Tensor | None]:
    """The arguments that the next token moves by one, where all others but the token and the mask stay as they are.

    Args:
        now: the model's arguments for the token of ``call``.
        then: those for the token after it.
        guess: what is most likely so.

    Returns:
        the names; with a guess also, on the device, whether that was wrong: then nothing is waited for.

    Raises:
        UnfitError: they change in another way; a step cannot know what the next one needs.
    """
    if now.keys() != then.keys():
        raise UnfitError("it changes the names of its arguments from token to token")
    moving = []
    wrong: list[Tensor] = []
    for name, value in now.items():
        after = then[name]
        if name in (call.tokens_name, call.cache_name) or value is after:
            continue
        if name == call.mask_name:
            whole = isinstance(after, Tensor) and after.dim() == 2 and after.shape[1] == value.shape[1] + 1
            expected = torch.nn.functional.pad(value, (0, 1), value=1)
            if not whole or (guess is None and not torch.equal(after, expected)):
                raise UnfitError(f"its {name} does not grow by a token")
        elif isinstance(value, Tensor) and isinstance(after, Tensor) and value.shape == after.shape:
            moves = not torch.equal(value, after) if guess is None else name in guess
            expected = value + 1 if moves else value
            if moves and (name not in call.copied or (guess is None and not torch.equal(expected, after))):
                raise UnfitError(f"its {name} changes with each token")
            moving += [name] if moves else []
        elif isinstance(value, Tensor) or isinstance(after, Tensor) or value != after:
            raise UnfitError(f"its {name} changes with each token")
        else:
            continue
        if guess is not None:
            wrong.append((after != expected).any())
    return tuple(moving), torch.stack(wrong).any() if wrong else None
