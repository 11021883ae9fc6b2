"""Switching it on for loaded models, over another implementation's name, and off again."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.compat.transformers import attention_name, goes_through_interface, set_attention_name
from hf_attn_patch.errors import AttentionError

from .attn.backends.registry import backend as backend_named
from .attn.codes import KINDS
from .compat.transformers import global_functions
from .handle import Handle
from .hf.attention_function import BACKEND_ATTRIBUTE, NAME, attention_forward
from .hf.call_visibility import pass_on
from .hf.mask_function import build_mask
from .hf.registration import register

#: in whose name :func:`enable` asks for caches and graphs
_OWNER = "enable"


def enable(
    model: torch.nn.Module,
    *,
    backend: str | None = None,
    cache: str | None = "auto",
    cuda_graphs: bool | str | None = "auto",
) -> Any:
    """Switch a loaded transformers model to ``hf_attn_patch``, and to all that is exact and makes it faster.

    A call says all of it anew: what it does not name takes its default.

    Args:
        model: a ``PreTrainedModel``; its sub-models (vision tower, text decoder) are switched with it. Or a module that
            holds some (PEFT's, ``torch.compile``'s, DistributedDataParallel's): they all are.
        backend: insist on one backend (see :data:`~hf_attn_patch.attn.backends.registry.BACKENDS`);
            None leaves the choice to each
            call.
        cache: what ``generate`` caches into. "auto": on a machine with a GPU :class:`hf_attn_patch.GrowingCache`, else
            the model's own; "growing": a GrowingCache anywhere; "int8" and "fp8": one that keeps
            keys and values as codes of 8 bits, half the memory and **not exact**; None: the model's own (unless
            :func:`hf_attn_patch.cache.growing_cache.use_growing_cache` asks for another).
        cuda_graphs: whether decoding steps on a GPU are recorded as CUDA graphs, one launch a token (see
            :func:`~hf_attn_patch.decoding.cuda_graphs.use_cuda_graphs`). "auto": wherever they can be; what cannot be
            recorded runs as it always did, and the log says why, once, as information. True: the same, and a warning
            says why. "compiled": steps of the model compiled by torch.compile, after up to a minute of
            compiling; on Hopper no faster than True. "unfused": as True, each operator of the model with its own
            kernels; else several small ones share one wherever that is as exact (``explain(model)`` says where).
            False: no more; None: as it is.

    Returns:
        The model.

    Raises:
        AttentionError: there is no transformers model in it, its attention does not go through transformers' attention
            interface, or an argument can't be served; the model is as it was.
    """
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

    outermost = _models_in(model)
    refuse_outside(model)
    if backend is not None:
        backend_named(backend)
    if cache not in (None, "auto", "growing", *KINDS):
        codes = " or ".join(map(repr, KINDS))
        raise AttentionError(
            f"there is no cache {cache!r}; choose 'growing', {codes} (codes of 8 bits, not exact), or None for the "
            "model's own"
        )
    if isinstance(cuda_graphs, str) and cuda_graphs not in ("auto", "compiled", "unfused"):
        raise AttentionError(f"cuda_graphs={cuda_graphs!r} is not known; choose True, 'compiled', 'unfused' or False")
    generates = any(isinstance(module, GenerationMixin) for module in model.modules())
    if not generates and (cache not in (None, "auto") or cuda_graphs in (True, "compiled", "unfused")):
        raise AttentionError(f"{type(model).__name__} cannot generate: it has no use for cache= and cuda_graphs=")
    register()
    for one in outermost:
        one.set_attn_implementation(NAME)
    kinds = {type(module.config) for module in model.modules() if isinstance(module, PreTrainedModel)}
    for module in model.modules():
        # up to 5.19 the call above misses stacks that hold a copy of their parent's config (the T5 family)
        if isinstance(module, PreTrainedModel) and attention_name(module.config) != NAME:
            module.set_attn_implementation(NAME)
        # an EncoderDecoderModel gives its parts new configs, and their layers keep the old ones
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and type(config) in kinds and attention_name(config) != NAME:
            set_attention_name(config, NAME)
        if backend is None:
            module.__dict__.pop(BACKEND_ATTRIBUTE, None)
        else:
            module.__dict__[BACKEND_ATTRIBUTE] = backend
    if generates:
        _speed_up_generate(model, cache, cuda_graphs)
    return model


def _models_in(model: Any) -> list[Any]:
    """The transformers models in a module that are in no other one.

    Raises:
        AttentionError: there are none.
    """
    from transformers import PreTrainedModel

    found: dict[Any, None] = {}
    pending = [model] if isinstance(model, torch.nn.Module) else []
    while pending:
        one = pending.pop()
        if isinstance(one, PreTrainedModel):
            found[one] = None
        else:
            pending += one.children()
    if found:
        return list(found)
    name = type(model).__name__
    if isinstance(getattr(model, "model", None), PreTrainedModel):  # a pipeline, a trainer
        raise AttentionError(f"{name} is no model: call enable() on its .model")
    raise AttentionError(f"{name} is not a transformers model, nor is one in it; use hf_attn_patch.attention in it")


def _speed_up_generate(model: torch.nn.Module, cache: str | None, cuda_graphs: bool | str | None) -> None:
    """What :func:`enable` does for a model that generates."""
    from .cache.growing_cache import Growth, ask_for_growing, withdraw_growing
    from .decoding.cuda_graphs import (
        Wish,
        ask_for_cuda_graphs,
        can_record_here,
        leave_cuda_graphs,
        withdraw_cuda_graphs,
    )

    if cache in KINDS or cache == "growing" or (cache == "auto" and can_record_here()):
        ask_for_growing(model, _OWNER, Growth(dtype=cache if cache in KINDS else None))
    else:
        withdraw_growing(model, _OWNER)
    if cuda_graphs is False:
        leave_cuda_graphs(model)
    elif cuda_graphs == "auto" and not can_record_here():
        withdraw_cuda_graphs(model, _OWNER)
    elif cuda_graphs is not None:
        wish = Wish(cuda_graphs == "compiled", loud=cuda_graphs != "auto", fused=cuda_graphs != "unfused")
        ask_for_cuda_graphs(model, _OWNER, wish)


def refuse_outside(model: torch.nn.Module) -> None:
    """Raise :class:`AttentionError` if any part of a model computes attention outside the attention interface."""
    from transformers import PreTrainedModel

    outside = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if isinstance(module, PreTrainedModel)
            and not goes_through_interface(module)
            and not type(module.config).__module__.startswith(__package__)  # stock parts of a grouped model
        }
    )
    if outside:
        raise AttentionError(
            f"{', '.join(outside)} computes attention in its own code, outside transformers' attention interface, so "
            "hf_attn_patch cannot replace it; hf_attn_patch.modeling has grouped versions of several such families"
        )


class override(Handle):  # noqa: N801 - called like a function, used as a context manager
    """Let models that ask for another implementation get this one, until undone.

    Args:
        name: an attention implementation, usually "sdpa", which most models default to.

    It acts at once, on every model in the process. Masks keep the form that ``name``'s own code expects, so families
    that compute attention by themselves are not disturbed.

    Blocks may be nested and handles undone in any order, each of them once; the last one puts back what was there.

    >>> undo = override("sdpa")
    >>> undo()
    >>> with override("sdpa"):
    ...     pass
    """

    def __init__(self, name: str = "sdpa") -> None:
        if name == "eager":
            raise AttentionError(
                "'eager' is each model's own code and cannot be overridden by name; "
                'load the model with attn_implementation="hf_attn_patch" or call hf_attn_patch.enable(model)'
            )
        self.name = name
        owner = object()
        super().__init__(functools.partial(_withdraw, _ask(name, owner), owner))


class _Replacement:
    """What stands in transformers' tables in place of another implementation: for whom, and what was there before.

    Code that kept a reference to our functions gets what was there before once nobody asks for ours any more.
    """

    def __init__(self, name: str) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

        self.name = name
        self.owners: set[object] = set()
        self.tables = [global_functions(interface) for interface in (AttentionInterface, AttentionMaskInterface)]
        if name not in self.tables[0]:
            raise AttentionError(f"transformers has no attention implementation {name!r} to override")
        self.before = [_living(table.get(name)) for table in self.tables]
        stock, stock_mask = self.before[0], self.before[1] or masking_utils.sdpa_mask

        @functools.wraps(attention_forward)
        def attention(*args: Any, **kwargs: Any) -> Any:
            return attention_forward(*args, **kwargs) if self.owners else stock(*args, **kwargs)

        def mask(*args: Any, **kwargs: Any) -> Any:
            return _with_pattern(stock_mask, args, kwargs) if self.owners else stock_mask(*args, **kwargs)

        self.ours: list[Any] = [attention, mask]
        for function, before in zip(self.ours, self.before, strict=True):
            function._hf_attn_before = self, before

    def stands(self) -> bool:
        """Whether transformers finds ours, and nobody has put something else in its place."""
        return self.tables[0].get(self.name) is self.ours[0]

    def put_in(self) -> None:
        for table, function in zip(self.tables, self.ours, strict=True):
            table[self.name] = function

    def take_out(self) -> None:
        for table, ours, before in zip(self.tables, self.ours, self.before, strict=True):
            if table.get(self.name) is not ours:
                continue
            before = _living(before)
            if before is None:
                del table[self.name]
            else:
                table[self.name] = before


def _living(function: Any) -> Any:
    """A function of ours that nobody asks for any more stands for what was there before it."""
    while (known := getattr(function, "_hf_attn_before", None)) is not None and not known[0].owners:
        function = known[1]
    return function


_replacements: dict[str, _Replacement] = {}
_lock = threading.Lock()


def _ask(name: str, owner: Any) -> _Replacement:
    with _lock:
        known = _replacements.get(name)
        if known is None or not known.stands():
            known = _Replacement(name)
            known.put_in()
            _replacements[name] = known
        known.owners.add(owner)
        return known


def _withdraw(replacement: _Replacement, owner: Any) -> None:
    with _lock:
        replacement.owners.discard(owner)
        if not replacement.owners:
            replacement.take_out()
            if _replacements.get(replacement.name) is replacement:
                del _replacements[replacement.name]


def _with_pattern(stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Another implementation's own mask, which also knows the pattern it was made from."""
    made = stock(*args, **kwargs)
    if isinstance(made, Tensor) and made.dtype is torch.bool and not torch.compiler.is_compiling():
        ours = build_mask(*args, **kwargs)
        if isinstance(ours, Tensor):
            pass_on(ours, made)
    return made
