"""The loop over a decoder's blocks, for the stock models whose own forward prepares masks that only their own attention
can read (MPT, Falcon with ALiBi) or one mask where two kinds of layers want one each (GPT-Neo)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from hf_attn_patch.compat.cache_keyword import is_paged, keyword_of, take_cache


def _by_keyword(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    """One of transformers' mask functions, called as (config, embeddings, attention_mask, cache, ...)."""
    keyword = keyword_of(make_mask)

    def mask(config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Any, **kwargs: Any) -> Any:
        kwargs[keyword] = cache
        return make_mask(config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    return mask


causal_mask = _by_keyword(create_causal_mask)
sliding_window_causal_mask = _by_keyword(create_sliding_window_causal_mask)
OUTPUT_CACHE = keyword_of(BaseModelOutputWithPastAndCrossAttentions)


def given(value: bool | None, default: bool) -> bool:
    """An argument of a forward, or what the config says."""
    return default if value is None else value


def given_cache(cache: Any, kwargs: dict[str, Any]) -> Any:
    """The cache that a model's forward was given, by any of its names.

    Raises:
        TypeError: two different ones, or the paged cache of continuous batching: these loops hand no places on.
    """
    cache = take_cache({**kwargs, "cache": cache})
    if cache is not None and is_paged(cache):
        raise TypeError("this family does not run under continuous batching: call generate instead of generate_batch")
    return cache


def embed(
    model: Any, table: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Any, use_cache: Any
) -> tuple[Tensor, Any]:
    """The embeddings [B, S, E] and the cache: the one given, a new one, or None."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if inputs_embeds is None:
        inputs_embeds = table(input_ids)
    if model.gradient_checkpointing and model.training:
        return inputs_embeds, None  # a block that runs twice would write twice
    if cache is None and given(use_cache, model.config.use_cache):
        cache = DynamicCache(config=model.config)
    return inputs_embeds, cache


def positions(position_ids: Tensor | None, hidden: Tensor, cache: Any) -> Tensor:
    """[1, S]: the positions after what the cache holds, unless they were given."""
    if position_ids is not None:
        return position_ids
    seen = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(hidden.shape[1], device=hidden.device) + seen).unsqueeze(0)


def run_blocks(
    model: Any,
    blocks: Iterable[nn.Module],
    hidden: Tensor,
    norm: nn.Module,
    arguments: Callable[[int], dict[str, Any]],
    *,
    cache: Any,
    cache_keyword: str,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    return_dict: bool | None,
) -> Any:
    """Run every block on what the one before gives; ``arguments(i)`` are those of block i.

    ``cache_keyword`` is the blocks' name for the cache. Blocks return (hidden [B, S, E], attention weights or None).
    """
    config = model.config
    keep_weights = given(output_attentions, config.output_attentions)
    attentions: tuple[Tensor | None, ...] = ()
    states: tuple[Tensor, ...] = ()
    for i, block in enumerate(blocks):
        states += (hidden,)
        hidden, weights = block(hidden, output_attentions=keep_weights, **{cache_keyword: cache}, **arguments(i))
        attentions += (weights,)
    hidden = norm(hidden)
    output = BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=hidden,
        hidden_states=(*states, hidden) if given(output_hidden_states, config.output_hidden_states) else None,
        attentions=attentions if keep_weights else None,
        **{OUTPUT_CACHE: cache},
    )
    return output if given(return_dict, config.return_dict) else output.to_tuple()
