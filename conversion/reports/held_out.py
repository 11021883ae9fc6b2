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
#: on a CPU nothing is measured of models with more weights than this: it takes minutes and their memory twice
CPU_WEIGHTS = 1_000_000_000


def measure(plan: Plan, converted: Path) -> dict[str, Any] | None:
    """Loss of source and result on a little text that the source writes; None for what writes none.

    Raises:
        ConversionError: one of them cannot be loaded, or the source cannot write.
    """
    import torch

    from hf_attn_patch.conversion.calibration.layers import load
    from hf_attn_patch.conversion.calibration.own_samples import own_samples
    from hf_attn_patch.conversion.calibration.polish import Speaker, losses
    from hf_attn_patch.conversion.loadcheck import device_named

    from .evaluation import load_causal
    from .report import cache_itemsize, kv_bytes_per_token

    weights = sum(t.nbytes for t in plan.source.tensors.values()) // cache_itemsize(plan)
    gpu = torch.cuda.is_available()
    if not plan.speaks or not plan.units or (weights > CPU_WEIGHTS and not gpu):
        return None
    device = device_named(None)
    dtype = torch.bfloat16 if gpu else torch.float32
    original = copy.copy(load(plan)).to(device, dtype)
    row_bytes = LENGTH * kv_bytes_per_token(plan.layers, 4, new=False)
    ids = own_samples(original, ROWS * LENGTH, LENGTH, seed=plan.seed, row_bytes=row_bytes)
    student = load_causal(str(converted), device, str(dtype).removeprefix("torch."), "hf_attn_patch")
    found = losses(Speaker(original), Speaker(student), ids, ROWS)
    return {"tokens": ids.numel(), "seen": False} | found


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
