"""Asking a model itself: a forward of its own code on stand-ins, and what its layers would ask of the backends."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_patch.attn.devices import Device
from hf_attn_patch.attn.dispatch import listening
from hf_attn_patch.attn.request import AttentionRequest, CallKind, request_of
from hf_attn_patch.attn.visibility import Visibility
from hf_attn_patch.compat.stand_in import rehearsal, stand_in
from hf_attn_patch.compat.torch import forget_wrappers
from hf_attn_patch.errors import AttentionError

from .situations import Situation, forwards, text_of


@dataclass(frozen=True)
class HeardCall:
    """One call of the attention function: ``path`` of the module that makes it, and what it asks for."""

    path: str
    module: nn.Module
    owner: nn.Module  # the innermost PreTrainedModel around it
    request: AttentionRequest
    queries: int
    keys: int
    window: tuple[int | None, int | None]
    insisted: str | None


@dataclass
class Rehearsed:
    """What a rehearsal heard: ``calls`` of the last forward of every module, and parts that could not be asked."""

    device: torch.device
    kind: Device
    calls: dict[str, list[HeardCall]] = field(default_factory=dict)
    unasked: list[tuple[str, str]] = field(default_factory=list)
    ran: set[int] = field(default_factory=set)
    training: bool = False
    _stack: list[tuple[str, nn.Module]] = field(default_factory=list)

    def all_calls(self) -> list[HeardCall]:
        """In the order in which their modules first ran."""
        return [call for calls in self.calls.values() for call in calls]

    def attach(self, model: nn.Module) -> None:
        """Follow which module of the shadow runs."""
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, _, path=path: self._enter(path, m))
            module.register_forward_hook(lambda *_: self._leave())

    def _enter(self, path: str, module: nn.Module) -> None:
        self._stack.append((path, module))

    def _leave(self) -> None:
        self.ran.add(id(self._stack.pop()[1]))

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """One forward: a module that runs again forgets what it asked for in the forwards before."""
        before, self.calls, self._stack = self.calls, {}, []
        token = listening.set(self._listen)
        try:
            yield
        finally:
            listening.reset(token)
            self.calls = {**before, **self.calls}

    def _listen(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Visibility, asked: CallKind
    ) -> tuple[Tensor, Tensor | None]:
        from transformers import PreTrainedModel

        request = request_of(asked._replace(device=torch.device("cpu")))
        path, module = self._stack[-1] if self._stack else ("", nn.Module())
        owner = next((m for _, m in reversed(self._stack) if isinstance(m, PreTrainedModel)), module)
        request = request._replace(device=self.kind.device, capability=self.kind.capability)
        call = HeardCall(path, module, owner, request, q.shape[2], seen.keys, seen.window, asked.backend)
        self.calls.setdefault(path, []).append(call)
        out = q.new_empty(*q.shape[:3], v.shape[3])
        if request.grad:  # for the layers above
            out = out + (q.sum() + k.sum() + v.sum())
        return out, q.new_empty(*q.shape[:3], k.shape[2]) if request.weights else None


def shadow(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """A copy of the model whose tensors are stand-ins, without its hooks and its caches."""
    from transformers import Cache

    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in [*module.parameters(False), *module.buffers(False), *vars(module).values()]:
            if isinstance(value, Tensor):
                memo[id(value)] = stand_in(value, device, dtype)
            elif isinstance(value, Cache):
                memo[id(value)] = None
    made = copy.deepcopy(model, memo)
    for module in made.modules():
        forget_wrappers(module)
        if getattr(module, "gradient_checkpointing", False) is True:
            module.__dict__["gradient_checkpointing"] = False
        for name, child in module.named_children():
            if (outputs := _packed_outputs(child)) is not None:
                setattr(module, name, _AnyLinear(outputs))
    return made


def _packed_outputs(module: Any) -> int | None:
    """The width of a quantized model's linear layer, whose own code reads numbers that a stand-in has not."""
    held = [*module.parameters(False), *module.buffers(False)]
    packed = any(t.element_size() == 1 or not t.is_floating_point() for t in held)
    outputs = getattr(module, "out_features", None) if packed and hasattr(module, "in_features") else None
    return outputs if type(outputs) is int else None


class _AnyLinear(nn.Module):
    """What the forwards of all linear layers share: shapes, the dtype of what comes in, and whether it is trained."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return x[..., :1] + x.new_empty(self.outputs)


def built(config: Any, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """A model of stand-ins from its config alone."""
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForTextToWaveform,
        PreTrainedConfig,
    )

    if not isinstance(config, PreTrainedConfig):
        raise AttentionError(f"{type(config).__name__} is neither a transformers model nor a config")
    options = {} if dtype is None else {"dtype": dtype}
    reason: Exception | None = None
    with rehearsal(device, floats=False):
        for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForTextToWaveform):
            try:
                made: nn.Module = auto.from_config(copy.deepcopy(config), attn_implementation="eager", **options)
                return made
            except Exception as error:  # the family's own code on somebody's config: whatever it may raise
                reason = reason or error
    said = ": ".join([type(reason).__name__, *str(reason).strip().splitlines()[:1]])  # a list of all models may follow
    raise AttentionError(f"no model can be made of {type(config).__name__} ({said}); load it, and pass the model")


def rehearse(
    model: nn.Module, heard: Rehearsed, situation: Situation, inputs: Mapping[str, Any] | None = None
) -> Rehearsed:
    """Run ``model`` (of stand-ins) in a situation, or on ``inputs``, and every part that this leaves out by itself."""
    from transformers import PreTrainedModel

    for module in model.modules():
        module.training = situation.training
    config: Any = getattr(model, "config", None)
    if situation.past and config is not None:  # training scripts switch it off
        config.use_cache = text_of(config).use_cache = True
    heard.attach(model)
    heard.training = situation.training
    if inputs is not None:
        _forward(model, heard, inputs)
        return heard
    parts = [(p, m) for p, m in model.named_modules() if p == "" or isinstance(m, PreTrainedModel)]
    done: list[str] = []
    for path, part in parts:
        if id(part) in heard.ran or any(path.startswith(d) for d in done):
            continue
        inside = [p for p, m in parts if p != path and p.startswith(f"{path}." if path else "")]
        try:
            _drive(part, heard, situation)
            done.append(f"{path}." if path and not inside else "\0")
        except AttentionError:
            raise
        except Exception as error:  # another model's code on inputs that we made up: whatever it may raise
            if not inside:
                heard.unasked.append((path or type(part).__name__, f"{type(error).__name__}: {error}"))
    return heard


def _forward(model: nn.Module, heard: Rehearsed, inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> Any:
    """One forward of ``model`` on ``inputs``, whose floats become ``dtype`` if given."""
    given = {
        name: stand_in(value, heard.device, dtype, floats=True) if type(value) is Tensor else value
        for name, value in inputs.items()
        if value is not None
    }
    with rehearsal(heard.device), torch.set_grad_enabled(heard.training), heard.forward():
        return model(**given)


def _drive(part: nn.Module, heard: Rehearsed, situation: Situation) -> None:
    """The forwards of a situation, one after another, each with what the ones before it left."""
    steps = forwards(part, situation)
    inputs = next(steps)
    dtype = next((p.dtype for p in part.parameters() if p.is_floating_point()), None)
    with contextlib.suppress(StopIteration):
        while True:
            inputs = steps.send(_forward(part, heard, inputs, dtype))
