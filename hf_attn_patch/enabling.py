"""Switching it on for loaded models, over another implementation's name, and off again."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.errors import AttentionError

from .attn.dispatch import backend as backend_module
from .hf.attention_function import BACKEND_ATTRIBUTE, NAME, attention_forward
from .hf.call_visibility import pass_on
from .hf.mask_function import build_mask
from .hf.registration import register


def enable(
    model: torch.nn.Module,
    *,
    backend: str | None = None,
    cache: str | None = None,
    cuda_graphs: bool | str | None = None,
) -> Any:
    """Switch a loaded transformers model to ``hf_attn_patch``.

    Args:
        model: a ``PreTrainedModel``; its sub-models (vision tower, text decoder) are switched with it.
        backend: insist on one backend (see :data:`~hf_attn_patch.attn.dispatch.BACKENDS`);
            None leaves the choice to each
            call.
        cache: "growing" makes ``generate`` use :class:`hf_attn_patch.GrowingCache`.
        cuda_graphs: on a GPU, record decoding steps with a growing cache as CUDA graphs, one launch a token (see
            :func:`~hf_attn_patch.decoding.cuda_graphs.use_cuda_graphs`);
            "compiled": those of the model compiled by torch.compile, the
            fastest, after a minute of compiling; False turns it off again, None leaves it as it is.

    Returns:
        The model.

    Raises:
        AttentionError: the model's attention does not go through transformers' attention interface, or an argument
            can't be served; the model is as it was.
    """
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise AttentionError(f"{type(model).__name__} is not a transformers model; use hf_attn_patch.attention in it")
    outside = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if isinstance(module, PreTrainedModel)
            and not module._can_set_attn_implementation()
            and not type(module.config).__module__.startswith(__package__)  # stock parts of a grouped model
        }
    )
    if outside:
        raise AttentionError(
            f"{', '.join(outside)} computes attention in its own code, outside transformers' attention interface, so "
            "hf_attn_patch cannot replace it; hf_attn_patch.modeling has grouped versions of several such families"
        )
    if backend is not None:
        backend_module(backend)
    if cache not in (None, "growing"):
        raise AttentionError(f"there is no cache {cache!r}; choose 'growing', or None for the model's own")
    if (cache or cuda_graphs) and not any(isinstance(module, GenerationMixin) for module in model.modules()):
        raise AttentionError(f"{type(model).__name__} cannot generate: it has no use for cache= and cuda_graphs=")
    if isinstance(cuda_graphs, str) and cuda_graphs != "compiled":
        raise AttentionError(f"cuda_graphs={cuda_graphs!r} is not known; choose True, 'compiled' or False")
    register()
    model.set_attn_implementation(NAME)
    kinds = {type(module.config) for module in model.modules() if isinstance(module, PreTrainedModel)}
    for module in model.modules():
        # up to 5.19 the call above misses stacks that hold a copy of their parent's config (the T5 family)
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != NAME:
            module.set_attn_implementation(NAME)
        # an EncoderDecoderModel gives its parts new configs, and their layers keep the old ones
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and type(config) in kinds and config._attn_implementation != NAME:
            config._attn_implementation = NAME
        if backend is None:
            module.__dict__.pop(BACKEND_ATTRIBUTE, None)
        else:
            module.__dict__[BACKEND_ATTRIBUTE] = backend
    if cache is not None:
        from .cache.growing_cache import use_growing_cache

        use_growing_cache(model)
    if cuda_graphs is not None:
        from .decoding.cuda_graphs import leave_cuda_graphs, use_cuda_graphs

        if cuda_graphs:
            use_cuda_graphs(model, compiled=cuda_graphs == "compiled")
        else:
            leave_cuda_graphs(model)
    return model


class override:  # noqa: N801 - called like a function, used as a context manager
    """Let models that ask for another implementation get this one, until undone.

    Args:
        name: an attention implementation, usually "sdpa", which most models default to.

    It acts at once, on every model in the process. Masks keep the form that ``name``'s own code expects, so families
    that compute attention by themselves are not disturbed.

    >>> undo = override("sdpa")
    >>> undo()
    >>> with override("sdpa"):
    ...     pass
    """

    def __init__(self, name: str = "sdpa") -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        if name == "eager":
            raise AttentionError(
                "'eager' is each model's own code and cannot be overridden by name; "
                'load the model with attn_implementation="hf_attn_patch" or call hf_attn_patch.enable(model)'
            )
        self._mappings: list[tuple[dict[str, Any], Any]] = []
        functions: tuple[tuple[Any, Callable[..., Any]], ...] = (
            (AttentionInterface, attention_forward),
            (AttentionMaskInterface, build_mask_for(name)),
        )
        self.name = name
        for interface, function in functions:
            mapping = interface._global_mapping
            if name not in mapping and interface is AttentionInterface:
                raise AttentionError(f"transformers has no attention implementation {name!r} to override")
            self._mappings.append((mapping, mapping.get(name)))
            mapping[name] = function

    def __call__(self) -> None:
        """Undo."""
        for mapping, before in self._mappings:
            if before is None:
                mapping.pop(self.name, None)
            else:
                mapping[self.name] = before
        self._mappings = []

    def __enter__(self) -> override:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self()


def build_mask_for(name: str) -> Callable[..., Any]:
    """The mask function of another implementation: its own mask, which also knows the pattern it was made from."""
    from transformers import AttentionMaskInterface, masking_utils

    stock = AttentionMaskInterface._global_mapping.get(name, masking_utils.sdpa_mask)
    if getattr(stock, "_hf_attn_stock", None) is not None:  # overridden twice: keep to the first
        stock = stock._hf_attn_stock

    def mask(*args: Any, **kwargs: Any) -> Any:
        made = stock(*args, **kwargs)
        if isinstance(made, Tensor) and made.dtype is torch.bool and not torch.compiler.is_compiling():
            ours = build_mask(*args, **kwargs)
            if isinstance(ours, Tensor):
                pass_on(ours, made)
        return made

    mask._hf_attn_stock = stock  # type: ignore[attr-defined]
    return mask
