"""Decoding steps as CUDA graphs: one launch a token instead of some forty a layer.

Decoding one token is little work in many kernels, and the host needs longer to start them than the GPU to run them. So
a step is recorded once, for one cache and one form of the inputs, and run again for each token. The model is its own:
what is recorded is its ``forward``, on a cache whose layers write at a place that is read on the device
(``step_layers.py``). Outside, nothing changes: it is the model's ``forward`` that is replaced, so ``generate`` and
loops of one's own take part, and the cache is a :class:`GrowingCache` before and after each step.

A step runs as it always did wherever it cannot be recorded: hooks, several devices, offloading, another cache, models
that look at lengths on the host, and so on; the log says why, once for each model and reason: as a warning if recording
was asked for by name, else as information. What a recorded step computes is compared with the ordinary one, once a
model.

A recorded step can be compiled as well: its shapes never change, so torch.compile takes it whole, and fuses the many
small kernels between the large ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin

from hf_attn_patch.compat.calls import Arguments
from hf_attn_patch.compat.torch import forward_hooks, forward_hooks_of_all
from hf_attn_patch.compat.transformers import captures_outputs, has_accelerate_hook
from hf_attn_patch.handle import Handle, of_each

from . import fusing, remembered
from .generating import leave_generate, stand_before_generate
from .recorded_forward import RecordedForward, Wish, forget_state, recorder_of, stand_before, state_of

DEVICES = {"cuda"}


def can_record_here() -> bool:
    """Whether this machine has a device on which steps are recorded."""
    return any(kind == "cpu" or torch.get_device_module(kind).is_available() for kind in DEVICES)


def why_not(model: Any) -> str | None:
    """Why no decoding step of ``model`` can be recorded, or None."""
    devices = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    if len(devices) != 1:
        return "its weights are on several devices"
    if next(iter(devices)).type not in DEVICES:
        return f"there are no CUDA graphs on {next(iter(devices))}"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return "its quantization cannot be recorded"
    if kinds := _rope_types(model.config) & {"dynamic", "longrope"}:
        return f"its {kinds.pop()} position embedding changes with the length"
    if forward_hooks_of_all():
        return "all modules have hooks"
    for name, module in model.named_modules():
        if has_accelerate_hook(module) or (module is not model and _hooked(module)):
            return f"it has hooks ({name})"
    return None


def _rope_types(config: Any) -> set[str]:
    """All ``rope_type`` in a config and those inside it."""
    found: set[str] = set()
    pending = [config.to_dict()]
    while pending:
        one = pending.pop()
        if isinstance(one.get("rope_type"), str):
            found.add(one["rope_type"])
        pending += [value for value in one.values() if isinstance(value, dict)]
    return found


def _hooked(module: torch.nn.Module) -> bool:
    """Hooks run when a step is recorded, not when it runs; those of transformers' output capturing do nothing then."""
    return any(not captures_outputs(hook) for hook in forward_hooks(module))


def _without_self(method: Callable[..., Any], _: Any, *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)


def use_cuda_graphs(model: torch.nn.Module, compiled: bool = False, fused: bool = True) -> Handle:
    """Record the decoding steps of a model with a :class:`GrowingCache` as CUDA graphs, in ``generate`` and in loops
    that call the model with one new token a row.

    Steps that cannot be recorded run as they always did; for which model and why is said by a warning, once.

    Args:
        compiled: compile the steps with torch.compile before they are recorded: faster by a third or so (norms, rotary
            embeddings and the like are fused, and the products of a single row are made anew), for up to a minute at
            the first step of a process.
        fused: without compiling, several small operators (norms, rotary embeddings, gated activations, products of one
            row) as one kernel, wherever that was found as exact on the model itself (``fusing.py``).

    Returns:
        a handle that undoes it. Asked for several times, the last that was not undone counts.

    Raises:
        TypeError: if nothing in ``model`` can generate.
    """
    return ask_for_cuda_graphs(model, object(), Wish(compiled, fused=fused))


def ask_for_cuda_graphs(model: torch.nn.Module, owner: Any, wish: Wish) -> Handle:
    """:func:`use_cuda_graphs` in the name of ``owner``, who asks once however often it asks."""
    generators = [module for module in model.modules() if isinstance(module, GenerationMixin)]
    if not generators:
        raise TypeError(f"{type(model).__name__} cannot generate, so it has no decoding steps to record")
    for module in generators:
        _change(module, lambda asked: {**{k: v for k, v in asked.items() if k != owner}, owner: wish})
    return of_each(generators, functools.partial(_withdraw, owner=owner))


def withdraw_cuda_graphs(model: torch.nn.Module, owner: Any) -> None:
    """Undo :func:`ask_for_cuda_graphs`."""
    for module in model.modules():
        if recorder_of(module) is not None:
            _withdraw(module, owner)


def leave_cuda_graphs(model: torch.nn.Module) -> None:
    """Undo every :func:`use_cuda_graphs`, and free what was recorded."""
    for module in model.modules():
        if recorder_of(module) is not None:
            _change(module, lambda asked: {})


def _withdraw(module: torch.nn.Module, owner: Any) -> None:
    if recorder_of(module) is not None:
        _change(module, lambda asked: {k: v for k, v in asked.items() if k != owner})
    else:  # something else stands before ours, which lets everything through from now on
        state_of(module).off = True


def recording_of(model: torch.nn.Module) -> str | None:
    """What becomes of a model's decoding steps, in a few words; None if nobody asks for recordings."""
    asked = [(module, recorder) for module in model.modules() if (recorder := recorder_of(module)) is not None]
    if not asked:
        return None
    module, recorder = asked[0]
    reason = state_of(module).refused or why_not(module)
    compiled = recorder.compiles and not state_of(module).uncompiled
    how = "compiled and recorded as CUDA graphs" if compiled else f"recorded as CUDA graphs{_fused(module)}"
    return how if reason is None else f"not recorded as CUDA graphs: {reason}"


def _fused(module: Any) -> str:
    """What was fused in a model's recorded steps, or why nothing was; empty before there is one."""
    told = fusing.told.get(module)
    if not told:
        return ""
    if isinstance(told, str):
        return f", each operator with its own kernels ({told})"
    return f", with one kernel each for {', '.join(f'{n} {kind}' for kind, n in sorted(told.items()))}"


def _change(module: Any, change: Callable[[dict[Any, Wish]], dict[Any, Wish]]) -> None:
    """Other wishes, and with them another wrapper (copies of the model share the old one); none: its own forward."""
    own, recorder = module.__dict__.get("forward"), recorder_of(module)
    if recorder is not None:
        inner, arguments, before = recorder.inner, recorder.arguments, recorder.asked
    else:
        arguments = Arguments(module)
        of_class = own is None or getattr(own, "__func__", None) is type(module).forward  # the latter in pickles
        inner = type(module).forward if of_class else functools.partial(_without_self, own)
        before = {}
    asked = change(before)
    fusing.told.pop(module, None)
    remembered.forget(module)
    forget_state(module)  # whoever asks again may have removed what was in the way
    if asked and [*asked.items()] == [*before.items()]:
        return
    if asked:
        stand_before_generate(module)
    else:
        leave_generate(module)
    if asked:
        stand_before(module, RecordedForward(inner, arguments, asked, why_not))
    elif isinstance(inner, functools.partial):
        module.__dict__["forward"] = inner.args[0]
    else:
        del module.__dict__["forward"]
