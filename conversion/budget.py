"""Numbers of KV heads chosen layer by layer under a budget, by the error that each choice was seen to make.

Experimental: few architectures can say a number for each layer (of stock transformers Step 3.7; Gemma 4 one for each
type of layer), and errors of single layers are no loss of the model. Layers are told apart by how much of what they add
is lost when their heads are merged, on calibration text and before anything is fitted; the numbers are those with the
smallest sum of these errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_attn_patch.errors import ConversionError

from .calibration.calibrated import Calibrated, refuse
from .calibration.collect import text_samples
from .calibration.layers import load, sides
from .calibration.moments import Moments
from .calibration.samples import Samples
from .checkpoints.hub import resolve
from .checkpoints.reader import no_reading_errors
from .families.kv_field import format_numbers
from .families.layer import LayerAttention
from .loadcheck import device_named
from .plan_data import Plan
from .planner import make_plan
from .reports.inspection import common_choices
from .reports.report import context_of


def kv_heads_under_budget(
    src: Any,
    budget: float,
    *,
    calibrate: str,
    calibration_tokens: int = 50_000,
    calibration_length: int | None = None,
    group: str | None = None,
    device: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> list[int]:
    """A number of KV heads for each layer, for ``convert``.

    Args:
        src: a checkpoint folder or a hub id; a model with one kind of attention, whose config can hold a list.
        budget: the share of the KV cache that may be left, 0 < budget <= 1.
        calibrate: text, as for the method ``calibrated``; so are the others.

    Raises:
        ConversionError: the architecture cannot express it, or no choice is that small.
    """
    if not 0 < budget <= 1:
        raise ConversionError(f"--kv-budget {budget}: give a share of the KV cache, such as 0.25")
    source = resolve(src, revision=revision, allow_pickle=allow_pickle)
    options = {
        "calibrate": calibrate, "calibration_tokens": calibration_tokens, "calibration_length": calibration_length,
        "group": group, "device": device, "refit": False,
    }  # fmt: skip
    with no_reading_errors(str(src)):
        now = make_plan(source, {}, method="mean")
        if any(not layer.stack.kv_field.per_layer for layer in now.layers):
            raise ConversionError(
                f"a {now.model_type} config has one number of KV heads for all layers, so --kv-budget has nothing to"
                " choose; give --kv-heads N"
            )
        before = [layer.kv_heads for layer in now.layers]
        # what a head of each layer costs
        kept = [layer.kept(context_of(now)) * (layer.head_dim + layer.value_dim) for layer in now.layers]
        most = math.floor(budget * sum(n * k for n, k in zip(before, kept, strict=True)) + 1e-9)
        choices = common_choices(now)
        plans = {n: make_plan(source, n, method="calibrated", seed=seed, options=options) for n in choices}
        plans = {n: plan for n, plan in plans.items() if all(layer.changes for layer in plan.layers)}
        if not plans or min(plans) * sum(kept) > most:
            least = min([*plans, *before]) * sum(kept) / sum(n * k for n, k in zip(before, kept, strict=True))
            raise ConversionError(f"--kv-budget {budget} is less than heads can be merged to; give at least {least:g}")
        errors = _probe(plans, options).errors()
    for known, n in zip(errors, before, strict=True):
        known[n] = 0.0
    return allot_together(errors, most, kept, _together(now))


def allot(errors: Sequence[Mapping[int, float]], most: int, costs: Sequence[int] | None = None) -> list[int]:
    """For each layer one of its numbers, at most ``most`` in all, with the smallest sum of errors.

    Args:
        costs: of one head of each layer (1 by default), such as the tokens that the layer keeps.

    Exact, by dynamic programming over how many heads are given away.

    >>> allot([{1: 0.0, 4: 0.0}, {1: 0.9, 2: 0.5, 4: 0.0}], 5)
    [1, 4]
    >>> allot([{1: 0.4, 2: 0.0}, {1: 0.5, 2: 0.0}], 13, costs=[1, 9])
    [2, 1]
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for known, cost in zip(errors, costs or [1] * len(errors), strict=True):
        found: dict[int, tuple[float, list[int]]] = {}
        for used, (error, numbers) in best.items():
            for n, more in known.items():
                total = used + n * cost
                if total <= most and (total not in found or error + more < found[total][0]):
                    found[total] = (error + more, [*numbers, n])
        best = found
    # of equal errors the fewest heads
    return min((error, used, numbers) for used, (error, numbers) in best.items())[2]


def allot_together(
    errors: Sequence[Mapping[int, float]], most: int, costs: Sequence[int], together: Sequence[Any]
) -> list[int]:
    """:func:`allot` where layers with the same mark must have the same number.

    >>> allot_together([{1: 0.4, 2: 0.0}, {1: 0.9, 2: 0.0}, {1: 0.5, 2: 0.0}], 5, [1, 1, 1], ["a", "b", "a"])
    [1, 2, 1]
    """
    groups: dict[Any, list[int]] = {}
    for i, mark in enumerate(together):
        groups.setdefault(mark, []).append(i)
    sums = [
        {n: sum(errors[i][n] for i in members) for n in errors[members[0]] if all(n in errors[i] for i in members)}
        for members in groups.values()
    ]
    chosen = allot(sums, most, [sum(costs[i] for i in members) for members in groups.values()])
    numbers = dict(zip(groups, chosen, strict=True))
    return [numbers[mark] for mark in together]


def _together(plan: Plan) -> list[Any]:
    """For each layer a mark: layers with the same one have the same number of KV heads."""
    types = getattr(plan.text_config, "layer_types", None)
    return [
        types[layer.index] if types and layer.stack.kv_field.varies == "types" else layer.index for layer in plan.layers
    ]


class _Probe(Calibrated):
    """Sends the text through the original alone, and at each layer tries every number of KV heads.

    Args:
        plans: by the number of KV heads. The others are those of :class:`~.calibration.calibrated.Calibrated`.
    """

    def __init__(
        self, plans: Mapping[int, Plan], original: Any, samples: Samples, *, group: str | None, device: torch.device
    ) -> None:
        super().__init__(plans[min(plans)], original, samples, refit=False, group=group, device=device)
        self.tried: list[dict[int, float]] = []
        self.plans = plans
        self.blocks = {n: sides(plan, self.original)[0].blocks for n, plan in plans.items()}

    def errors(self) -> list[dict[int, float]]:
        """For each layer: number of KV heads -> relative squared error of what the layer gives."""
        while len(self.tried) < len(self.plan.layers):
            self.step()
        self.bar.close()
        return self.tried

    def _pass(self) -> None:
        block, streams = self._current.blocks[self.number], self.streams
        truth, theirs, own = self._open(block)
        if not block.attentions:  # hybrids; layers that read another's cache
            self._check(streams.original(theirs))
            streams.ours = streams.theirs.clone()
            return
        ((layer, inside),) = block.attentions
        streams.part()
        with Moments(truth.get_submodule(inside), layer) as moments:
            size = streams.original(theirs)
        self._check(size)
        self.tried.append({n: self._try(n, layer, truth, moments, own, size) for n in self.plans})
        streams.ours = streams.theirs.clone()

    def _try(self, n: int, layer: LayerAttention, truth: Any, moments: Moments, own: Any, size: float) -> float:
        (unit,) = (unit for unit in self.plans[n].units if unit.layer.prefix == layer.prefix)
        block = self.blocks[n][self.number]
        student = self._student(block, truth, [(unit, block.attentions[0][1])], [self._merge(unit, moments)])
        error = self.streams.error(own(student), size)
        return error if error > self.streams.noise else 0.0


def _probe(plans: Mapping[int, Plan], options: Mapping[str, Any]) -> _Probe:
    """What is tried, with the model and the text that the options name."""
    plan = plans[min(plans)]
    refuse(plan)
    device, original = device_named(options["device"]), load(plan)
    samples = text_samples(
        plan, original, options["calibrate"], tokens=options["calibration_tokens"],
        length=options["calibration_length"], device=device,
    )  # fmt: skip
    return _Probe(plans, original, samples, group=options["group"], device=device)


def describe(numbers: Sequence[int], budget: float) -> str:
    """What was chosen, in a line."""
    return f"KV heads by layer under a budget of {budget:g} (experimental): {format_numbers(numbers)}"
