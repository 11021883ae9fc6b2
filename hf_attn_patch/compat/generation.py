"""Private names of transformers' ``generate``: what stands before its methods, and another loop than its own, call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .ground import known

#: the method by which ``generate`` makes the cache of a call (transformers 5.17 to 5.24)
PREPARE_CACHE = "_prepare_cache_for_generation"
#: the method by which ``generate`` computes the prompt (transformers 5.17 to 5.24)
PREFILL = "_prefill"
#: the way of decoding that chooses one token a row and step: greedy search and sampling (transformers 5.17 to 5.24)
_ONE_BY_ONE = "_sample"


@known("transformers", f"GenerationMixin.{PREPARE_CACHE} and {PREFILL}")
def generate_method(model: Any, name: str) -> Callable[..., Any]:
    """A method of a model's class that ``generate`` calls, unbound: :data:`PREPARE_CACHE` or :data:`PREFILL`."""
    return getattr(type(model), name)  # type: ignore[no-any-return]


@known("transformers", f"GenerationMixin.{_ONE_BY_ONE}")
def one_by_one(model: Any) -> Callable[..., Any]:
    """The loop of greedy search and sampling of a model's class, unbound."""
    return getattr(type(model), _ONE_BY_ONE)  # type: ignore[no-any-return]


@known("transformers", f"GenerationMixin.{_ONE_BY_ONE}")
def decodes_like_all(model: Any) -> bool:
    """Whether a model's class has ``generate`` and its loop from ``GenerationMixin``, and not a way of its own."""
    from transformers import GenerationMixin

    theirs, all_have = type(model), GenerationMixin
    return theirs.generate is all_have.generate and one_by_one(model) is getattr(all_have, _ONE_BY_ONE)


@known("transformers", "is_fsdp_managed_module and is_deepspeed_zero3_enabled of generation.utils")
def processes_step_together(model: Any) -> bool:
    """Whether ``generate`` has every process of a group take as many steps as the slowest, if it is not told
    (``synced_gpus``): their weights are in parts, which all of them must ask for."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    from transformers.generation import utils

    return bool(utils.is_deepspeed_zero3_enabled() or utils.is_fsdp_managed_module(model))


@known("transformers", f"GenerationMixin.{PREFILL}")
def prefill_of(model: Any) -> Callable[..., Any]:
    """``(input_ids, generation_config, model_kwargs, is_first_iteration=)`` -> the model's output for the prompt."""
    return getattr(model, PREFILL)  # type: ignore[no-any-return]


@known("transformers", "GenerationMixin._update_model_kwargs_for_generation")
def next_arguments_of(model: Any) -> Callable[..., dict[str, Any]]:
    """``(outputs, model_kwargs, is_encoder_decoder=, num_new_tokens=)`` -> the model_kwargs after so many tokens."""
    return model._update_model_kwargs_for_generation  # type: ignore[no-any-return]


@known("transformers", "GenerationMixin._optimize_model_for_decode")
def decoding_context(model: Any) -> AbstractContextManager[Any]:
    """Within, experts run as transformers has them run while decoding."""
    return model._optimize_model_for_decode()  # type: ignore[no-any-return]


@known("transformers", "GenerationConfig._pad_token_tensor")
def pad_token(generation_config: Any) -> Any:
    """The token that finished rows go on with, a tensor [], in the config of a running call; None if there is none."""
    return generation_config._pad_token_tensor
