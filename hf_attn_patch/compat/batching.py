"""How transformers' continuous batching chooses an attention implementation, and what it hands to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .ground import known
from .transformers import attention_name

#: the module whose import brings the manager
MODULE = "transformers.generation.continuous_batching.continuous_api"


@known("transformers", "how generate_batch chooses an implementation (switch_to_cb_friendly_attn)")
def admit_to_batching(ours: Callable[[str], bool]) -> None:
    """Let ``generate_batch`` run models whose implementation is ours as they are.

    Its manager takes implementations by name: "sdpa", "paged|eager" and those with "flash" in it, which can only be
    FlashAttention's own and kernels of the hub (``set_attn_implementation`` refuses a registered name like that). Any
    other is refused from 5.19 on; and where FlashAttention or ``kernels`` is installed, all versions from 5.17 to 5.24
    exchange it for that, and "sdpa" too.

    Args:
        ours: says of an implementation's name whether it leads to us.
    """
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    chosen_before = ContinuousBatchingManager.switch_to_cb_friendly_attn
    if hasattr(chosen_before, "_hf_attn_admits"):
        return

    @functools.wraps(chosen_before)
    def switch(manager: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if not ours(str(attention_name(model.config))):
            chosen_before(manager, model, *args, **kwargs)

    switch._hf_attn_admits = True  # type: ignore[attr-defined]
    ContinuousBatchingManager.switch_to_cb_friendly_attn = switch


@known(
    "transformers", "how generate_batch decides on block tables (initialization.ensure_decode_fast_path_is_available)"
)
def admit_to_block_tables(ours: Callable[[str], bool], read_here: Callable[[], bool]) -> None:
    """Let ``generate_batch`` hand its block tables to implementations of ours, where the user asks for them
    (``ContinuousBatchingConfig(max_blocks_per_request=...)``).

    transformers offers them to FlashAttention 2 and 3 on a GPU alone, and warns others that ask. For 5.20 to 5.24.
    Before, it does not say which layers have a table, and the warning stays.

    Args:
        ours: says of an implementation's name whether it leads to us.
        read_here: whether our kernel for pages runs on this machine.
    """
    from transformers.generation.continuous_batching import initialization

    decided_before = initialization.ensure_decode_fast_path_is_available
    if hasattr(decided_before, "_hf_attn_admits"):
        return
    allocators = getattr(initialization, "ATTN_TYPE_TO_ALLOCATOR", None)
    if allocators is None:
        return
    kinds_of = initialization.group_layers_by_attn_type

    @functools.wraps(decided_before)
    def decide(config: Any, batching: Any, user_requested: bool) -> None:
        asked = user_requested and batching.max_blocks_per_request and ours(str(attention_name(config)))
        if not (asked and read_here() and all(allocators[kind].supports_block_table for kind in kinds_of(config))):
            decided_before(config, batching, user_requested)

    decide._hf_attn_admits = True  # type: ignore[attr-defined]
    initialization.ensure_decode_fast_path_is_available = decide


def pages_of(cache: Any, layer: Any, table: Any) -> tuple[Any, Any, Any]:
    """A layer's pages of K and V [pages, page, HKV, D] and its block table, of the paged cache before 5.19.

    Later ones hand all three themselves.
    """
    group, index = cache.layer_index_to_group_indices[layer]
    shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
    return cache.key_cache[index].view(shape), cache.value_cache[index].view(shape), table[group]


def layer_writes_pages(kwargs: dict[str, Any]) -> bool:
    """Whether these keyword arguments of an attention function come from continuous batching, with a paged cache that
    the layer has updated already, as it does from 5.24 on."""
    return kwargs.get("write_index") is not None
