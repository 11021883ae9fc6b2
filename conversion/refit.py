"""Teach each layer of a converted model, one after the other, to give what the original's layer gives.

Merging keeps as much of a layer's keys and values as fits into fewer heads. What is lost is lost on average over all
inputs; here each layer's attention is fitted to what the original layer gives on real text, starting from the merged
weights. The student's layer reads the student's own inputs (with the errors of the layers below it), and its target is
the output of the teacher's layer on the teacher's inputs: a layer also learns to undo what the layers below got wrong.

Nothing is trained end to end: no gradient passes from one layer to another, and one layer's hidden states of the
calibration text are all that is kept. Every token of text constrains E numbers a layer, so little text goes far.

Shapes: B batch, S sequence, E model width, N sequences of calibration text.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RefitRecipe:
    """How each layer is fitted.

    Attributes:
        epochs: passes over the calibration text, for each layer.
        batch_tokens: tokens a step.
        lr: peak learning rate of Adam; cosine to zero.
        train: ``attention`` or ``layer`` (the MLP too).
    """

    epochs: float = 8.0
    batch_tokens: int = 16384
    lr: float = 1e-3
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    train: str = "attention"
    target: str = "layer"
    optimizer: str = "adam"
    seed: int = 0


class StopForwardError(Exception):
    """Ends a forward once the first layer's inputs are known."""


@torch.no_grad()
def layer_inputs(model: nn.Module, layers: Sequence[nn.Module], ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """What the first layer reads for ``ids`` [N, S], as [N, S, E], and every layer's other arguments.

    The other arguments (positions, masks) depend on S alone, so one sequence tells them for all.
    """
    arguments: list[dict[str, Any]] = []
    hidden: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append((args[0] if args else kwargs["hidden_states"]).clone())
        raise StopForwardError

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        model(input_ids=ids[:1], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    handle = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for block in ids.split(16):
            with contextlib.suppress(StopForwardError):
                model(input_ids=block, use_cache=False)
    finally:
        handle.remove()
    return torch.cat(hidden), arguments


def run_layer(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    out = layer(hidden, **arguments)
    return out[0] if isinstance(out, tuple) else out


def refit(
    student: nn.Module,
    teacher: nn.Module,
    student_layers: Sequence[nn.Module],
    teacher_layers: Sequence[nn.Module],
    ids: Tensor,
    recipe: RefitRecipe,
    *,
    autocast: Callable[[], Any],
    log: Callable[[str], None] | None = None,
) -> list[tuple[float, float]]:
    """Fit the layers of ``student`` in place to those of ``teacher``, first to last.

    Args:
        ids: calibration text, [N, S].

    Returns:
        For each layer its error before and after, relative to the size of the layer's own contribution.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    with autocast():
        theirs, arguments = layer_inputs(teacher, teacher_layers, ids)
    ours = theirs.clone()
    N, S, _ = theirs.shape
    batch = max(1, min(N, recipe.batch_tokens // S))
    steps = max(1, round(recipe.epochs * N / batch))
    errors = []
    for i, (layer, truth) in enumerate(zip(student_layers, teacher_layers, strict=True)):
        fit = _Fit(layer, truth, arguments[i], recipe, autocast)
        aims, after = fit.targets(theirs, batch)
        errors.append(fit.run(ours, aims, theirs, batch, steps, generator))
        if log:
            log(f"  layer {i}: {errors[-1][0]:.4f} -> {errors[-1][1]:.4f}")
        ours, theirs = fit.outputs(ours, batch), after
    return errors


class _Fit:
    """One layer's fit: the student's layer, the teacher's, and the arguments that both are called with."""

    def __init__(
        self,
        layer: nn.Module,
        truth: nn.Module,
        arguments: dict[str, Any],
        recipe: RefitRecipe,
        autocast: Callable[[], Any],
    ) -> None:
        self.layer, self.truth, self.arguments, self.recipe, self.autocast = layer, truth, arguments, recipe, autocast

    @torch.no_grad()
    def targets(self, hidden: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """What is aimed at, and what the teacher's layer gives (the same, unless attention alone is aimed at)."""
        aims, outs = [], []
        with self.autocast():
            for block in hidden.split(batch):
                aim, out = self.call(self.truth, block)
                aims.append(aim)
                outs.append(out)
        after = torch.cat(outs)
        return (after if self.recipe.target == "layer" else torch.cat(aims)), after

    @torch.no_grad()
    def outputs(self, hidden: Tensor, batch: int) -> Tensor:
        with self.autocast():
            return torch.cat([self.call(self.layer, block)[1] for block in hidden.split(batch)])

    def call(self, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(what is compared, the layer's output)."""
        if self.recipe.target == "layer":
            out = run_layer(layer, hidden, self.arguments)
            return out, out
        taps: list[Tensor] = []
        middle: Any = layer.post_attention_layernorm  # reads the residual after attention
        hook = middle.register_forward_pre_hook(lambda _module, args: taps.append(args[0]))
        try:
            out = run_layer(layer, hidden, self.arguments)
        finally:
            hook.remove()
        return taps[0], out

    def run(
        self, hidden: Tensor, aims: Tensor, before: Tensor, batch: int, steps: int, generator: torch.Generator
    ) -> tuple[float, float]:
        """Adam on the relative squared error; returns it before and after."""
        recipe, N = self.recipe, len(hidden)
        size = (aims - before).float().square().mean()
        parameters = [p for n, p in self.layer.named_parameters() if recipe.train == "layer" or "attn" in n]
        if recipe.optimizer == "muon":
            matrices = [p for p in parameters if p.ndim == 2]
            optimizer: torch.optim.Optimizer = torch.optim.Muon(
                matrices, lr=recipe.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            )
        else:
            optimizer = torch.optim.Adam(parameters, lr=recipe.lr, betas=recipe.betas, fused=hidden.is_cuda)
        warmup = max(1, round(recipe.warmup * steps))
        order: list[Tensor] = []
        losses: list[Tensor] = []
        for step in range(steps):
            if not order:
                order = list(torch.randperm(N, generator=generator).split(batch))
            rows = order.pop().to(hidden.device)
            done = max(0.0, (step - warmup) / max(1, steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))
            with self.autocast():
                out, _ = self.call(self.layer, hidden[rows])
            loss = (out.float() - aims[rows].float()).square().mean() / size
            loss.backward()
            optimizer.step()
            self.layer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        tail = losses[-max(1, steps // 10) :]
        return float(losses[0]), float(torch.stack(tail).mean())
