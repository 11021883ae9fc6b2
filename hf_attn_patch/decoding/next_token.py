"""How a call of ``generate`` chooses its tokens, in a form that runs on the device alone.

transformers' processors and criteria read the ids of all tokens, which grow by one at each step. Here what they read of
them has a fixed place: which words a row has said (repetition penalty), how many tokens there are (minimal lengths),
which rows are unfinished. What is not known to be served by that is refused, and the call goes on token by token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from hf_attn_patch.compat.generation import pad_token

from .outputs import UnfitError

#: these read the scores alone, and wait for nothing: they are called as they are
_OF_SCORES = frozenset(
    getattr(transformers, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "LogitNormalization",
        "InfNanRemoveLogitsProcessor",
        "SuppressTokensLogitsProcessor",
    )
)
#: these act at one length alone: of one id, and of ``begin_index``
_FIRST = transformers.ForcedBOSTokenLogitsProcessor
_BEGIN = transformers.SuppressTokensAtBeginLogitsProcessor
_PENALTY = transformers.RepetitionPenaltyLogitsProcessor
_MINIMA = frozenset({transformers.MinLengthLogitsProcessor, transformers.MinNewTokensLengthLogitsProcessor})


class NextToken:
    """The choice of one call.

    Args:
        processors: transformers' ``LogitsProcessorList`` of the call.
        criteria: its ``StoppingCriteriaList``.
        config: its ``GenerationConfig``.

    Attributes:
        max_length: ids of a row at which the call ends.
        first: ids of a row up to which tokens are not chosen here (some are suppressed at the beginning, or not
            penalized when they come again).
        last: ids of a row from which on tokens are not chosen here (a token that is forced at the end).
        eos: the tokens that end a row, int64 [N], or None.
        pad: what a finished row goes on with, int64 []; None without ``eos``.

    Raises:
        UnfitError: something needs each token as it comes.
    """

    def __init__(self, processors: Any, criteria: Any, config: Any) -> None:
        self.sampling = bool(config.do_sample)
        self.processors = list(processors)
        self.times = [c for c in criteria if type(c) is MaxTimeCriteria]
        ends = [c for c in criteria if type(c) is EosTokenCriteria]
        limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        unknown = len(criteria) - len(ends) - len(limits) - len(self.times)
        if unknown or len(ends) > 1 or not limits:
            raise UnfitError("its stopping criteria look at each token")
        self.last = self.max_length = min(limits)
        self.eos: Tensor | None = ends[0].eos_token_id if ends else None
        self.pad: Tensor | None = pad_token(config) if ends else None
        self.first = 0
        for processor in processors:
            kind = type(processor)
            if kind is _FIRST:
                self.processors.remove(processor)
                self.first = max(self.first, 1)  # no ids are before it where a prompt is embeddings
            elif kind is _BEGIN:
                self.processors.remove(processor)
                self.first = max(self.first, int(processor.begin_index))
            elif kind is transformers.ForcedEOSTokenLogitsProcessor:
                self.processors.remove(processor)
                self.last = min(self.last, processor.max_length - 1)
            elif kind is _PENALTY:
                self.first = max(self.first, _ignored(processor) - 1)
            elif kind not in _OF_SCORES and kind not in _MINIMA:
                raise UnfitError(f"{kind.__name__} looks at each token")

    def out_of_time(self) -> bool:
        """Whether the time is over that the call was given."""
        nothing = torch.zeros(1, 1, dtype=torch.int64)
        return any(bool(criterion(nothing, None)[0]) for criterion in self.times)


class Choosing:
    """The device's side of a :class:`NextToken`: its memory, and the choice itself, which waits for nothing.

    Args:
        how: what to do.
        vocabulary: V, the number of scores a row.
        like: ids [B, S] so far: their B and device.
        room: tokens a row that are kept.

    Attributes:
        tokens: int64 [B, room], those chosen so far.
        unfinished: int64 [B], 1 for rows that go on.
        look: int64 [B + 2], for the host: the tokens chosen last, how many rows go on, and whether scores were NaN.
    """

    def __init__(self, how: NextToken, vocabulary: int, like: Tensor, room: int) -> None:
        self.how, self.vocabulary = how, vocabulary
        new, B = like.new_zeros, like.shape[0]
        self.tokens = new(B, room, dtype=torch.int64)
        self.unfinished = new(B, dtype=torch.int64)
        self.look = new(B + 2, dtype=torch.int64)
        self.places = new(2, dtype=torch.int64)  # the column of `tokens` that comes next, and how many ids there are
        self.column, self.length = self.places[0:1], self.places[1:2]
        self.said: dict[int, Tensor] = {}  # of a repetition penalty: bool [B, V]
        self.ends: dict[int, Tensor] = {}  # of a minimal length: bool [V]
        words = torch.arange(vocabulary, device=like.device)
        self.eos = None if how.eos is None else how.eos.to(like.device)
        self.pad = None if how.pad is None else how.pad.to(like.device)
        for i, processor in enumerate(how.processors):
            if type(processor) in _MINIMA:
                self.ends[i] = torch.isin(words, processor.eos_token_id.to(like.device))
            elif type(processor) is _PENALTY:
                self.said[i] = new(B, vocabulary, dtype=torch.bool)

    def load(self, ids: Tensor, unfinished: Tensor) -> None:
        """Begin after ``ids [B, S]``."""
        self.unfinished.copy_(unfinished)
        self.column.zero_()
        self.length.fill_(ids.shape[1])
        for i, said in self.said.items():  # the processor itself says what it takes for said
            ones = torch.ones(said.shape, device=ids.device)
            said.copy_(self.how.processors[i](ids, ones) != 1)

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row, int64 [B], from ``logits [B, V]``."""
        how = self.how
        scores = self.processed(logits.float())
        if how.sampling:
            # as torch.multinomial draws one, with the same random numbers, but for its look at the numbers
            probabilities = torch.softmax(scores, dim=-1)
            noise = torch.empty_like(probabilities).exponential_(1)
            chosen = torch.argmax(probabilities / noise, dim=-1)
            broken = probabilities.gather(1, chosen[:, None]).isnan().any()
        else:
            chosen = torch.argmax(scores, dim=-1)
            broken = torch.zeros((), dtype=torch.bool, device=scores.device)
        if self.eos is not None and self.pad is not None:
            chosen = chosen * self.unfinished + self.pad * (1 - self.unfinished)
            self.unfinished.mul_((chosen[:, None] != self.eos).all(1))
        for said in self.said.values():
            said.scatter_(1, chosen[:, None], True)
        self.tokens.index_copy_(1, self.column, chosen[:, None])
        self.places.add_(1)
        torch.cat([chosen, self.unfinished.sum()[None], broken[None].long()], out=self.look)
        return chosen

    def processed(self, scores: Tensor) -> Tensor:
        """What transformers' processors make of float32 scores [B, V]."""
        for i, processor in enumerate(self.how.processors):
            if i in self.said:
                penalty = processor.penalty
                penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
                scores = torch.where(self.said[i], penalized, scores)
            elif i in self.ends:
                scores = torch.where(self.ends[i] & (self.length < _minimum(processor)), -math.inf, scores)
            else:
                scores = processor(None, scores)
        return scores


def _ignored(penalty: Any) -> int:
    """Ids at a row's beginning that a repetition penalty does not see, at most; transformers counts padding so."""
    ignored = penalty.prompt_ignore_length
    return int(ignored.max()) if isinstance(ignored, Tensor) else ignored or 0


def _minimum(processor: Any) -> int:
    """Ids of a row below which it may not end."""
    if type(processor) is transformers.MinLengthLogitsProcessor:
        return int(processor.min_length)
    return int(processor.prompt_length_to_skip + processor.min_new_tokens)
