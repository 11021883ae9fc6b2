"""Teach each layer of a converted model, one after the other, to give what the original's layer gives.

Merging keeps as much of a layer's keys and values as fits into fewer heads. What is lost is lost on average over all
inputs; here each layer's attention is fitted to what the original layer gives on real text, starting from the merged
weights. The student's layer reads the student's own inputs (with the errors of the layers below it), and its target is
the output of the teacher's layer on the teacher's inputs: a layer also learns to undo what the layers below got wrong.

Nothing is trained end to end: no gradient passes from one layer to another, and two sets of hidden states of the
calibration text are all that is kept. Every token of text constrains E numbers a layer, so little text goes far.

Shapes: S sequence, E model width, N sequences of calibration text.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_patch.conversion.processes import current

#: what a layer is called with beside hidden states: positional and keyword arguments
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
#: which sequences of the calibration text
Rows = slice | Tensor
#: a layer: from hidden states [B, S, E] of those sequences to the next layer's
LayerFunction = Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True)
class RefitRecipe:
    """How each layer is fitted.

    Attributes:
        epochs: passes over the calibration text, for each layer.
        batch_tokens: tokens a step, fewer where that would make less than 16 steps of a pass.
        lr: peak learning rate of Adam at a width of 512 or less, in inverse proportion beyond; cosine to zero.
    """

    epochs: float = 8.0
    batch_tokens: int = 16384
    lr: float = 3e-3
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int = 0


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate at one of ``steps``: linear over the share ``warmup`` of them, then cosine to
    zero.

    >>> [round(schedule(step, 100, 0.05), 2) for step in (0, 4, 52, 99)]
    [0.2, 1.0, 0.51, 0.0]
    """
    first = max(1, round(warmup * steps))
    done = max(0.0, (step - first) / max(1, steps - first))
    return min(1.0, (step + 1) / first) * 0.5 * (1 + math.cos(math.pi * done))


#: an attempt is given up whose error after a quarter of its steps is so many times what it was before: the rest of the
#: steps took it down by 1.9 at most (Whisper tiny.en, layer by layer: benchmarks/results/real_models.md)
HOPELESS = 2.0


class StopForwardError(Exception):
    """Ends a forward once the first layer's inputs are known."""


@torch.no_grad()
def first_input(run: Callable[[Tensor], object], layer: nn.Module, ids: Tensor) -> Tensor:
    """What the first ``layer`` reads for ``ids`` [B, S]: [B, S, E]. Nothing behind it is run."""
    found: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise StopForwardError

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with contextlib.suppress(StopForwardError):
            run(ids)
    finally:
        handle.remove()
    return found[0]


@torch.no_grad()
def layer_inputs(
    run: Callable[[Tensor], object], layers: Sequence[nn.Module], ids: Tensor
) -> tuple[Tensor, list[Arguments], list[Tensor]]:
    """What the first layer reads for ``ids`` [N, S], as [N, S, E]; every layer's other arguments; and, for the first
    sequence, what every layer reads [1, S, E].

    The other arguments (positions, masks) depend on S alone, so one sequence tells them for all.

    Args:
        run: sends ids [B, S] through the layers.
    """
    arguments: list[Arguments] = []
    seen: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())
        arguments.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        run(ids[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([first_input(run, layers[0], block) for block in ids.split(16)]), arguments, seen


def run_layer(layer: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """A layer's output [B, S, E]."""
    out = layer(hidden, *arguments[0], **arguments[1])
    return out[0] if isinstance(out, tuple) else out


class TwoStreams:
    """Calibration text on its way up through the original's layers and the converted model's.

    With several processes each has both streams whole, and sends its share of the sequences through the layers.

    Args:
        hidden: [N, S, E], what the first layer of both reads; kept where it is (on the CPU, for one).
        device: where layers run.
        noise: an error relative to the layer's contribution that is arithmetic, not loss.
        kept: which positions count, [N, S] bool; None: all.
        reads: S' of what the layers read beside their own stream, if that is longer.
        together: the converted model's stream is the original's until :meth:`part`.

    Attributes:
        theirs: what the original's next layer reads, ours: what the converted model's does; [N, S, E].
    """

    def __init__(
        self,
        hidden: Tensor,
        recipe: RefitRecipe,
        *,
        device: torch.device,
        autocast: Callable[[], Any] = contextlib.nullcontext,
        noise: float = 1e-10,
        kept: Tensor | None = None,
        reads: int = 0,
        together: bool = False,
    ) -> None:
        self.theirs, self.ours = hidden, hidden if together else hidden.clone()
        self.recipe, self.device, self.autocast, self.noise = recipe, device, autocast, noise
        self.kept, self.processes = kept, current()
        N, S, E = hidden.shape
        self.batch = max(1, min(recipe.batch_tokens // max(S, reads), N // 16))
        self.lr = recipe.lr * min(1.0, 512 / E)
        # a fit is kept if it helps on sequences that it has not seen
        self.unseen = min(N // 8, 16)
        self.generator = torch.Generator().manual_seed(recipe.seed)

    def part(self) -> None:
        """From here on the converted model's stream is another one than the original's."""
        if self.ours is self.theirs:
            self.ours = self.theirs.clone()

    def squares(self, x: Tensor, rows: Rows) -> Tensor:
        """The sum of x^2 [B, S, E] over the positions of ``rows`` that count."""
        square = x.float().square().sum(-1)
        return square.sum() if self.kept is None else (square * self._kept(rows).to(x.device)).sum()

    def numbers(self, rows: Rows) -> int:
        """How many numbers the positions of ``rows`` that count hold."""
        if self.kept is None:
            return math.prod(self.theirs[rows].shape)
        return int(self._kept(rows).sum()) * self.theirs.shape[-1]

    def _kept(self, rows: Rows) -> Tensor:
        assert self.kept is not None
        return self.kept[rows if isinstance(rows, slice) else rows.to(self.kept.device)]

    @torch.no_grad()
    def original(self, layer: LayerFunction) -> float:
        """Send the original's stream through its next layer; returns the mean square of what the layer adds."""
        total = 0.0
        for rows in self._blocks():
            mine = self._mine(rows)
            before = after = self.theirs[mine].to(self.device)
            if len(before):
                with self.autocast():
                    after = layer(before, mine)
                total += float(self.squares(after.float() - before.float(), mine))
            self._put(self.theirs, rows, after)
        return self.processes.total(total)[0] / max(1, self.numbers(slice(None)))

    @torch.no_grad()
    def converted(self, layer: LayerFunction) -> None:
        """Send the converted model's stream through its next layer."""
        for rows in self._blocks():
            mine = self._mine(rows)
            out = self.ours[mine].to(self.device)
            if len(out):
                with self.autocast():
                    out = layer(out, mine)
            self._put(self.ours, rows, out)

    def _blocks(self) -> Iterator[slice]:
        """A batch for each process."""
        N, size = len(self.ours), self.batch * self.processes.count
        for start in range(0, N, size):
            yield slice(start, min(start + size, N))

    def _mine(self, rows: slice) -> slice:
        share = self.processes.share(rows.stop - rows.start)
        return slice(rows.start + share.start, rows.start + share.stop)

    def _put(self, stream: Tensor, rows: slice, mine: Tensor) -> None:
        stream[rows] = self.processes.gathered(mine.to(stream.dtype), rows.stop - rows.start).to(stream.device)

    def fit(self, layer: LayerFunction, parameters: Sequence[nn.Parameter], size: float) -> tuple[float, float]:
        """Fit a converted layer: from ``ours`` (its inputs) to ``theirs`` (already what the original's layer gave).

        Args:
            parameters: what is trained; floating point, on ``device``.
            size: the mean square that errors are relative to, from :meth:`original`.

        Returns:
            the relative squared error on unseen sequences before and after; the same number twice where nothing was
            to be done or nothing helped, and then the parameters are as they were.
        """
        before = self.error(layer, size)
        if not self.unseen or not size or before <= self.noise:
            return before, before
        start = [p.detach().clone() for p in parameters]
        for attempt in range(3):  # a learning rate that is too high shows early
            most = HOPELESS * before if attempt < 2 else math.inf
            if self._train(layer, parameters, size, self.lr / 4**attempt, most):
                after = self.error(layer, size)
                if after < before:
                    return before, after
            with torch.no_grad():
                for p, value in zip(parameters, start, strict=True):
                    p.copy_(value)
        return before, before

    @torch.no_grad()
    def error(self, layer: LayerFunction, size: float) -> float:
        """Relative squared error of a converted layer from ``ours`` to ``theirs``, on unseen sequences if there are."""
        last = self.unseen or len(self.ours)
        total, mine = 0.0, self.processes.share(last)
        for start in range(mine.start, mine.stop, self.batch):
            rows = slice(start, min(start + self.batch, mine.stop))
            x, y = self.ours[rows], self.theirs[rows]
            with self.autocast():
                out = layer(x.to(self.device), rows)
            total += float(self.squares(out.float() - y.to(self.device).float(), rows))
        count = max(1, self.numbers(slice(0, last)))
        return self.processes.total(total)[0] / count / max(size, torch.finfo(torch.float32).tiny)

    def _train(
        self, layer: LayerFunction, parameters: Sequence[nn.Parameter], size: float, lr: float, most: float
    ) -> bool:
        """Adam on the relative squared error; whether it went to the end: after a quarter of the steps it is given up
        where the error on unseen sequences is above ``most``."""
        recipe = self.recipe
        known = len(self.ours) - self.unseen
        steps = max(1, round(recipe.epochs * known / self.batch))
        optimizer = torch.optim.Adam(parameters, lr=lr, betas=recipe.betas, fused=self.device.type == "cuda")
        order: list[Tensor] = []
        hopeless = False
        for step in range(steps):
            if not order:
                order = list((self.unseen + torch.randperm(known, generator=self.generator)).split(self.batch))
            rows = order.pop().to(self.ours.device)
            mine = rows[self.processes.share(len(rows))]
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, steps, recipe.warmup)
            if len(mine):
                with self.autocast():
                    out = layer(self.ours[mine].to(self.device), mine)
                square = self.squares(out.float() - self.theirs[mine].to(self.device).float(), mine)
                loss = square / (max(1, self.numbers(rows)) * size)
                gradients: Sequence[Tensor] = torch.autograd.grad(loss, list(parameters))
            else:
                gradients = [torch.zeros_like(p) for p in parameters]
            for p, gradient in zip(parameters, self.processes.summed(gradients), strict=True):
                p.grad = gradient
            optimizer.step()
            hopeless = step + 1 == steps // 4 and not self.error(layer, size) <= most
            if hopeless:
                break
        for p in parameters:
            p.grad = None
        return not hopeless


def refit(
    teacher: nn.Module,
    student_layers: Sequence[nn.Module],
    teacher_layers: Sequence[nn.Module],
    ids: Tensor,
    recipe: RefitRecipe,
    *,
    trained: Callable[[nn.Module], Sequence[nn.Parameter]],
    autocast: Callable[[], Any] = contextlib.nullcontext,
    noise: float = 1e-10,
) -> list[tuple[float, float]]:
    """Fit the layers of a student in place to those of ``teacher``, first to last, both in memory.

    Args:
        ids: calibration text, [N, S].
        trained: the parameters of a student's layer that are fitted.

    Returns:
        For each layer its error before and after, relative to the size of the layer's own contribution.
    """
    with autocast():
        run = lambda block: teacher(input_ids=block, use_cache=False)  # noqa: E731
        hidden, arguments, _ = layer_inputs(run, teacher_layers, ids)
    streams = TwoStreams(hidden, recipe, device=ids.device, autocast=autocast, noise=noise)
    errors = []
    for layer, truth, given in zip(student_layers, teacher_layers, arguments, strict=True):
        size = streams.original(lambda x, _, truth=truth, given=given: run_layer(truth, x, given))  # type: ignore[misc]
        ours: LayerFunction = lambda x, _, layer=layer, given=given: run_layer(layer, x, given)  # type: ignore[misc]  # noqa: E731
        errors.append(streams.fit(ours, trained(layer), size))
        streams.converted(ours)
    return errors
