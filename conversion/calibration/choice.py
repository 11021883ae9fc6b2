"""What the method ``calibrated`` does with a model, by what it is given and where it runs."""

from __future__ import annotations

from typing import Any

import torch

from hf_attn_patch.conversion.loadcheck import device_named
from hf_attn_patch.conversion.methods.method import Merge
from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.conversion.processes import current
from hf_attn_patch.errors import ConversionError

from .answers import Answered, held_out
from .calibrated import Calibrated, refuse
from .collect import LENGTH, collected
from .gather import OWN, gathered, reads_text
from .layers import load, load_by_names
from .meaningless import aligned
from .samples import Samples
from .sight import pictured, seen
from .text import INSTALLED, longest, tokenizer_of
from .whole import Whole, on_device

#: calibration tokens where the model is trained end to end, is fitted layer by layer, or is only merged
GPU_TOKENS, TOKENS, MERGE_TOKENS = 1 << 20, 500_000, 1 << 12
#: of a sequence that a model writes where nothing is fitted
MERGE_LENGTH = 64
#: recordings that a model makes itself where nothing is fitted
MERGE_SAMPLES = 24
#: tokens of the last pass end to end on a GPU; of the text for a pass that is asked to be short, at least
POLISH, POLISH_TOKENS = 4_000_000, 1 << 16
#: tokens that encoders read, where their decoders' answers are then trained on; and of them layers are fitted on
PAIR_TOKENS, FIT_TOKENS = 1 << 22, 1 << 17


def calibrated(
    plan: Plan,
    calibrate: str | None = None,
    calibration_tokens: int | None = None,
    calibration_length: int | None = None,
    calibration_samples: int | None = None,
    refit: bool | None = None,
    polish: int | None = None,
    group: str | None = None,
    device: str | None = None,
) -> Merge:
    """Heads are merged by what layers read on a calibration text, and attentions fitted to the original's on it.

    Causal language models are taken as a whole (:class:`~.whole.Whole`) where a GPU has room for them, and with text of
    their own; layer by layer (:class:`~.calibrated.Calibrated`) everything else, and what ``refit`` asks for.
    """
    where = device_named(device)
    if not plan.units:  # every layer has that many heads already
        return aligned(plan, group)
    if "pictures" in plan.family.reads and calibrate is not None:
        return _by_pictures(plan, calibrate, calibration_samples, refit, polish, group, where)
    refuse(plan)
    gpu, alone, asked = where.type == "cuda", plan.speaks, calibrate is not None
    pairs = plan.answers and plan.family.reads == "text"
    if calibrate is None:
        calibrate = _without_text(plan, gpu) if alone or pairs else OWN
    texts = reads_text(calibrate)
    if calibration_samples is not None and plan.family.reads == "text":
        raise ConversionError(f"--calibration-samples counts recordings and pictures, and {plan.model_type} reads text")
    if polish and not (alone or plan.answers):
        raise ConversionError(f"--polish is for models that write by themselves, as {plan.model_type} does not here")
    if polish is None:
        polish = POLISH if gpu and (alone or pairs) else 0
    if refit is None:
        refit = (texts and not gpu) if alone else (texts or gpu)
    if calibration_tokens is None:
        most = PAIR_TOKENS if pairs and gpu else GPU_TOKENS if alone or pairs else 0
        # of what an encoder reads, a decoder says a part
        trained = bool(polish) and min(most, max(POLISH_TOKENS, polish * (16 if pairs else 1)))
        calibration_tokens = trained or (TOKENS if texts or refit else MERGE_TOKENS)
    small = not (texts or refit or polish)
    if calibration_length is None and small and alone:
        calibration_length = longest(plan, MERGE_LENGTH)
    if not alone:
        if calibration_samples is None and small:
            calibration_samples = MERGE_SAMPLES
        amounts = (calibration_tokens, calibration_length, calibration_samples)
        return _by_layers(plan, calibrate, amounts, refit, polish, group, where, asked)
    if refit or (texts and not polish):
        steps = _steps(plan, calibrate, (calibration_tokens, calibration_length, None), refit, group, where)
        return Later(plan, steps, where, polish, group)
    try:
        with current().all_or_none():
            original = on_device(load_by_names(plan), where)
            ids, about, notes = gathered(
                plan, original, tokenizer_of(plan) if texts else None, calibrate, tokens=calibration_tokens,
                length=calibration_length, longest=longest(plan, LENGTH, calibration_length), whole=False, device=where,
            )  # fmt: skip
    except ConversionError as error:
        if asked:
            raise
        return _by_random_inputs(plan, group, error)
    if not polish:
        notes.append(f"heads were merged by what layers read on {ids.numel()} tokens that the model wrote{_ONLY}")
    return Whole(plan, original, ids, about, notes, polish_tokens=polish, group=group)


#: what a merge by a model's own text is told with
_ONLY = (
    ", and nothing was fitted to the original's after that: a GPU does it in minutes, --calibrate TEXT and --polish"
    " TOKENS do it here, and keep far more"
)
Amounts = tuple[int, int | None, int | None]


def _steps(
    plan: Plan, calibrate: str, amounts: Amounts, refit: bool, group: str | None, device: torch.device
) -> Calibrated:
    """Layer by layer; ``amounts``: tokens, length and count, see :func:`~.collect.collected`."""
    source, samples = _collected(plan, calibrate, amounts, device)
    return _prepared(plan, source, samples, refit, group, device)


def _collected(plan: Plan, calibrate: str, amounts: Amounts, device: torch.device) -> tuple[Any, Samples]:
    """The source, and what it is calibrated on."""
    source, (tokens, length, count) = load_by_names(plan), amounts
    return source, collected(plan, source, calibrate, tokens=tokens, length=length, count=count, device=device)


def _prepared(
    plan: Plan, source: Any, samples: Samples, refit: bool, group: str | None, device: torch.device
) -> Calibrated:
    steps = Calibrated(plan, source, samples, refit=refit, group=group, device=device)
    steps.prepare()
    return steps


def _by_layers(
    plan: Plan, calibrate: str, amounts: Amounts, refit: bool, polish: int, group: str | None, device: torch.device,
    asked: bool,
) -> Merge:  # fmt: skip
    """What encoders and encoder-decoders get; what nobody ``asked`` for may fail, and is replaced."""
    try:
        with current().all_or_none():
            source, samples = _collected(plan, calibrate, amounts, device)
            some = _some(samples) if polish and plan.answers and plan.family.reads == "text" else None
            steps = _prepared(plan, source, samples if some is None else some, refit, group, device)
    except ConversionError as error:
        if asked:
            raise
        return _by_random_inputs(plan, group, error)
    if not refit:
        steps.record["notes"].append(
            f"heads were merged by what layers read on {len(steps.samples)} samples"
            + " that the model made itself" * (calibrate == OWN)
            + ", and nothing was fitted to the original's after that: --refit does it, on data of the model's use"
            " (--calibrate) it keeps far more"
        )
    return Answered(steps, polish, None if some is None else samples) if plan.answers else steps


def _by_pictures(
    plan: Plan, calibrate: str, count: int | None, refit: bool | None, polish: int | None, group: str | None,
    device: torch.device,
) -> Merge:  # fmt: skip
    """What models that see get: on a GPU, or where it is asked for, layers are fitted; not of two towers at a time."""
    towers = plan.family.reads != "pictures"
    if polish or (refit and towers):
        asked = "--polish" if polish else "--refit"
        way = "; its vision tower converted by itself can be fitted" if towers else ""
        raise ConversionError(f"{asked} is not for {plan.model_type}: its heads are merged alone{way}")
    if refit or (refit is None and device.type == "cuda" and not towers):
        source = load(plan)
        return _prepared(plan, source, pictured(plan, source, calibrate, count), True, group, device)
    return seen(plan, calibrate, count, group=group, device=device)


def _by_random_inputs(plan: Plan, group: str | None, error: ConversionError) -> Merge:
    """What is done where calibration that nobody asked for fails."""
    merge = aligned(plan, group)
    merge.record["notes"].append(f"heads were merged by what layers read on random inputs: {error}")
    return merge


def _some(samples: Samples) -> Samples | None:
    """Those that layers are fitted on where more are trained on after that; None: all."""
    held, count = held_out(len(samples)), FIT_TOKENS // samples.inputs[0].shape[1]
    return samples.only(torch.arange(held, held + count)) if held + count < len(samples) else None


def _without_text(plan: Plan, gpu: bool) -> str:
    """The calibration text where none is given: on a GPU half of it the installed Python's, if there is a tokenizer."""
    if not gpu:
        return OWN
    try:
        tokenizer_of(plan)
    except ConversionError:
        return OWN
    return f"{OWN},{INSTALLED}"


class Later:
    """Layers fitted one after the other; then the whole is measured on held-out text, and polished."""

    def __init__(self, plan: Plan, steps: Calibrated, device: torch.device, polish: int, group: str | None) -> None:
        self.plan, self.steps, self.device, self.polish, self.group = plan, steps, device, polish, group
        self.record: dict[str, Any] = steps.record
        self.whole: Whole | None = None

    def __call__(self, weights: Any) -> Any:
        if self.whole is None:
            steps = self.steps
            start = steps.all()
            # on the CPU the one that is mapped; a copy would stand in memory as a whole
            original = steps.original if self.device.type == "cpu" else on_device(steps.original, self.device)
            self.whole = Whole(
                self.plan,
                original,
                steps.samples.inputs[0],
                {},
                [],
                polish_tokens=self.polish,
                group=self.group,
                start=start,
            )
            made = self.whole(weights)
            self.record |= {k: v for k, v in self.whole.record.items() if k in ("held_out", "polish")}
            self.record["notes"] += self.whole.record["notes"]
            return made
        return self.whole(weights)
