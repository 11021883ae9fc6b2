"""What a conversion lost, measured right after it on text that it has not seen; and a warning where that is much."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hf_attn_patch.conversion.plan_data import Plan

#: nats a token that a conversion may lose without a warning
BOUND = 0.2
#: text that a model writes where a method needs none: sequences and tokens of each
ROWS, LENGTH = 16, 64
#: recordings that are made for models that hear: each has thousands of frames
RECORDINGS = 4
#: on a CPU nothing is measured of models with more weights than this: it takes minutes and their memory twice
CPU_WEIGHTS = 1_000_000_000


def measure(plan: Plan, converted: Path) -> dict[str, Any] | None:
    """Loss of source and result on a little that the source writes, or says of something; None for what cannot.

    Raises:
        ConversionError: one of them cannot be loaded, or the source cannot write.
    """
    import torch

    from hf_attn_patch.conversion.calibration.layers import load
    from hf_attn_patch.conversion.calibration.own_samples import own_samples
    from hf_attn_patch.conversion.calibration.polish import Speaker, losses
    from hf_attn_patch.conversion.loadcheck import device_named

    from .causal_models import load_causal
    from .report import cache_itemsize, kv_cache_bytes

    weights = sum(t.nbytes for t in plan.source.tensors.values()) // cache_itemsize(plan)
    gpu = torch.cuda.is_available()
    if not (plan.speaks or plan.answers) or not plan.units or (weights > CPU_WEIGHTS and not gpu):
        return None
    device = device_named(None)
    dtype = torch.bfloat16 if gpu else torch.float32
    original = copy.copy(load(plan)).to(device, dtype)
    if plan.answers:
        return _of_answers(plan, original, converted)
    row_bytes = kv_cache_bytes(plan.layers, 4, new=False, tokens=LENGTH)
    ids = own_samples(original, ROWS * LENGTH, LENGTH, seed=plan.seed, row_bytes=row_bytes)
    student = load_causal(str(converted), device, str(dtype).removeprefix("torch."), "hf_attn_patch")
    found = losses(Speaker(original), Speaker(student), ids, ROWS)
    return {"tokens": ids.numel(), "seen": False} | found


def _of_answers(plan: Plan, original: Any, converted: Path) -> dict[str, Any]:
    """The same of an encoder-decoder: what it says of what it makes itself."""
    import torch
    from transformers import AutoConfig, AutoModel

    from hf_attn_patch.conversion.calibration.answers import Answerer, losses
    from hf_attn_patch.conversion.calibration.collect import OWN_LENGTH, collected
    from hf_attn_patch.conversion.calibration.gather import OWN
    from hf_attn_patch.conversion.calibration.own_pairs import heard
    from hf_attn_patch.conversion.loadcheck import model_class_of, quiet

    samples = collected(
        plan, original, OWN, tokens=ROWS * OWN_LENGTH, length=None, count=RECORDINGS, device=original.device
    )  # fmt: skip
    config = AutoConfig.from_pretrained(converted, trust_remote_code=False)
    with quiet():
        kind = model_class_of(plan.new_config, config) or AutoModel
        student = (
            kind.from_pretrained(converted, dtype=original.dtype, trust_remote_code=False).to(original.device).eval()
        )
    memory = samples.memory if samples.memory is not None else heard(original, samples.inputs[0])
    own = any(not unit.layer.stack.cached for unit in plan.units)
    theirs = heard(student, samples.inputs[0]) if own else memory
    found = losses(
        Answerer(original, memory, samples), Answerer(student, theirs, samples), samples, torch.arange(len(samples))
    )  # fmt: skip
    return {"tokens": found.pop("tokens"), "seen": False} | found


def told(held_out: dict[str, Any]) -> str:
    """One line for people."""
    before, after = held_out["loss_before"], held_out["loss_after"]
    what = "the text that was calibrated on" if held_out["seen"] else "held-out text"
    return (
        f"loss on {held_out['tokens']} tokens of {what}: {before:.3f} before, {after:.3f} after"
        f" ({after - before:+.3f}; KL {held_out['kl']:.3f})"
    )


def warning(held_out: dict[str, Any], method: str) -> str | None:
    """What to do about a model that lost more than :data:`BOUND`; None where it did not."""
    lost = max(held_out["loss_after"] - held_out["loss_before"], held_out["kl"])
    if lost <= BOUND:
        return None
    more = {
        "calibrated": "more of --polish TOKENS (on a GPU), more --calibrate TEXT like that of its use",
    }.get(method, "--method auto, which calibrates")
    return (
        f"the conversion lost {lost:.2f} nats a token, more than {BOUND}, and should not be used as it is. The way out:"
        f" {more}, more KV heads, or uptraining (examples/uptrain.py with --teacher the source)"
    )
