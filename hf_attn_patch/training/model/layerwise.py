"""A first phase that fits every layer's attention to the teacher's, each on the teacher's own inputs.

All layers learn at once and none waits for those below: the student's layers are fed what the teacher's were, and the
error is measured at the output of attention (as in patient and layer-wise distillation, e.g. arXiv 2412.20677).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_patch.errors import TrainingError
from hf_attn_patch.losses.chunked import IGNORE, LossSums

from .trainable import attention_modules, layers_of


@dataclass
class Trace:
    """What went into each layer, and what came out of each attention module, in the order of the model."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def tracing(model: Any, given: Trace | None = None) -> Iterator[Trace]:
    """Record a forward of ``model``; with ``given``, feed its layers the inputs of that trace instead of their own.

    Raises:
        TrainingError: the model does not say what its layers are.
    """
    trace = Trace()
    layers = [m for m in layers_of(model) if next(attention_modules(m), None)]
    if not layers:
        raise TrainingError(f"--layerwise-tokens: {type(model).__name__} does not say what its layers are")

    def at_input(index: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            own = args[0] if args else kwargs["hidden_states"]
            trace.inputs[index] = own.detach()
            if given is None:
                return None
            fed = given.inputs[index].to(own.dtype)
            return ((fed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": fed})

        return hook

    def at_output(index: int, layer: Any) -> Callable[..., None]:
        def hook(_: nn.Module, _args: Any, out: Any) -> None:
            out = trace.outputs[index] = out[0] if isinstance(out, tuple) else out
            if hasattr(layer, "unshard") and out.requires_grad:  # FSDP2 waits for a gradient of the layer's own output
                out.register_hook(lambda _: layer.unshard())

        return hook

    handles = [m.register_forward_pre_hook(at_input(i), with_kwargs=True) for i, m in enumerate(layers)]
    attentions = [(module, layer) for layer in layers for _, module in attention_modules(layer)]
    handles += [m.register_forward_hook(at_output(i, layer)) for i, (m, layer) in enumerate(attentions)]
    checkpointing = getattr(model, "is_gradient_checkpointing", False)
    if checkpointing:  # recomputation would run without these hooks
        model.gradient_checkpointing_disable()
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})


def layerwise_loss(student: Trace, teacher: Trace, labels: Tensor) -> LossSums:
    """The squared error of attention outputs relative to the teacher's, averaged over layers, summed over tokens.

    Args:
        labels: of the batch; where outputs are [T, E] beside them, tokens without a label do not count.
    """
    valid = labels.reshape(-1) != IGNORE
    count = valid.sum().float()
    total = torch.zeros((), device=labels.device)
    for index, wanted in teacher.outputs.items():
        t = wanted.detach().float().flatten(0, -2)
        s = student.outputs[index].float().flatten(0, -2)
        error = (s - t).square().sum(-1) / t.square().sum(-1).clamp(min=1e-12)
        total = total + ((error * valid).sum() if len(error) == len(valid) else error.mean() * count)
    loss = total / len(teacher.outputs)
    return LossSums(loss, loss.detach(), torch.zeros_like(count), count)
