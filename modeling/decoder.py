"""The loop over a decoder's blocks, for the stock models whose own forward prepares masks that only their own attention
can read (MPT, Falcon with ALiBi) or one mask where two kinds of layers want one each (GPT-Neo)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


def given(value: bool | None, default: bool) -> bool:
    """An argument of a forward, or what the config says."""
    return default if value is None else value


def embed(
    model: Any, table: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Any, use_cache: Any
) -> tuple[Tensor, Any]:
    """The embeddings [B, S, E] and the cache: the one given, a new one, or None."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if inputs_embeds is None:
        inputs_embeds = table(input_ids)
    keep = given(use_cache, model.config.use_cache) and not (model.gradient_checkpointing and model.training)
    if keep and cache is None:
        cache = DynamicCache(config=model.config)
    return inputs_embeds, cache if keep else None


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
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    return_dict: bool | None,
) -> Any:
    """Run every block on what the one before gives; ``arguments(i)`` are those of block i.

    Blocks return (hidden [B, S, E], attention weights or None).
    """
    config = model.config
    keep_weights = given(output_attentions, config.output_attentions)
    attentions: tuple[Tensor | None, ...] = ()
    states: tuple[Tensor, ...] = ()
    for i, block in enumerate(blocks):
        states += (hidden,)
        hidden, weights = block(hidden, layer_past=cache, output_attentions=keep_weights, **arguments(i))
        attentions += (weights,)
    hidden = norm(hidden)
    output = BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=hidden,
        past_key_values=cache,
        hidden_states=(*states, hidden) if given(output_hidden_states, config.output_hidden_states) else None,
        attentions=attentions if keep_weights else None,
    )
    return output if given(return_dict, config.return_dict) else output.to_tuple()
