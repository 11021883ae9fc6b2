"""DeepSpeed through accelerate: ZeRO-1 and ZeRO-2, which share out the optimiser's state and the gradients.

accelerate's way of asking DeepSpeed for bf16 casts the weights themselves; ours is torch's autocast over fp32 weights,
as without DeepSpeed, so that a run has the same losses and ends in the same checkpoint.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import torch

from hf_attn_patch.errors import TrainingError
from hf_attn_patch.training.options import UptrainOptions


def is_wanted() -> bool:
    """Whether accelerate launch was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def configure(accelerator: Any, options: UptrainOptions, precision: str) -> None:
    """Tell DeepSpeed what it otherwise reads off a DataLoader or a config, before anything is prepared.

    Args:
        precision: of the arithmetic: ``no`` or ``bf16``.

    Raises:
        TrainingError: the options or accelerate's config ask for what DeepSpeed can't do, or not exactly.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        raise TrainingError(
            "accelerate runs DeepSpeed only on GPUs, and there is none; use examples/accelerate/ddp.yaml"
        )
    config = plugin.deepspeed_config
    stage = config["zero_optimization"]["stage"]
    if stage not in (1, 2):
        raise TrainingError(
            f"DeepSpeed's zero_stage {stage} is not supported, 1 and 2 are; where the weights don't fit on each GPU, "
            "examples/accelerate/fsdp2.yaml shards student and teacher"
        )
    if "optimizer" in config or "scheduler" in config:
        raise TrainingError(
            "the DeepSpeed config names an optimizer or a scheduler: leave both out, --lr, --decay and the like say it"
        )
    if precision == "fp16":
        raise TrainingError("--precision fp16 is not supported under DeepSpeed; use bf16 or no")
    if options.layerwise_tokens:  # ZeRO's flat optimiser decays and counts what has no gradient, too
        raise TrainingError(
            "--layerwise-tokens is not supported under DeepSpeed, whose optimiser also moves the weights that this "
            "phase leaves alone; use examples/accelerate/fsdp2.yaml or ddp.yaml"
        )
    if options.dtype != "float32":
        raise TrainingError("DeepSpeed keeps fp32 weights: leave out --dtype, or use examples/accelerate/fsdp2.yaml")
    config |= {
        "train_batch_size": options.batch_size,
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "gradient_clipping": options.clip,
        "bf16": {"enabled": False},
        # no modules named: all gradients are summed over processes in fp32
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }


def computes_in_bf16(accelerator: Any) -> bool:
    """Whether products are made in bf16, with DeepSpeed or without."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return bool(accelerator.mixed_precision == "bf16")
    return bool(plugin.deepspeed_config["torch_autocast"]["enabled"])


def autocast(accelerator: Any) -> AbstractContextManager[Any]:
    """accelerate's autocast, or for what DeepSpeed's engine does not run the same as inside the engine."""
    if accelerator.state.deepspeed_plugin is not None and computes_in_bf16(accelerator):
        return torch.autocast(accelerator.device.type, dtype=torch.bfloat16)
    return accelerator.autocast()  # type: ignore[no-any-return]
