"""What a checkpoint keeps in an attention, and whether its row accounts for all of it.

A method that turns keys, values and outputs into another basis is exact only if nothing that it does not know of stands
between them. Most of what could stand there has tensors: so a row must name every tensor of its attentions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping, Sequence

from hf_attn_patch.errors import ConversionError

from .layer import LayerAttention, norm_tensors

#: how stock classes call norms that have one gain [D] for all heads
SHARED_NORMS = (
    "q_norm",
    "k_norm",
    "q_layernorm",
    "k_layernorm",
    "query_layernorm",
    "key_layernorm",
    "norm_q",
    "norm_k",
)
#: buffers that stock classes keep, or once kept, in their attentions: they say nothing that the config does not
BUFFERS = ("masked_bias", "inv_freq", "rotary_emb.inv_freq", "embed_positions", "causal_mask")


def is_buffer(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a buffer that no stock class loads: a mask's -inf there is no damage.

    >>> is_buffer("h.0.attn.bias", [1, 1, 64, 64]), is_buffer("h.0.attn.c_attn.bias", [96])
    (True, False)
    """
    return name.endswith(tuple(f".{buffer}" for buffer in BUFFERS)) or (name.endswith(".bias") and len(shape) == 4)


def tensors_below(names: Sequence[str], prefix: str) -> list[str]:
    """Those of sorted ``names`` that begin with ``prefix``, without it."""
    first, last = bisect_left(names, prefix), bisect_left(names, prefix + "\U0010ffff")
    return [name.removeprefix(prefix) for name in names[first:last]]


def norm_on_keys(names: Container[str], layer: LayerAttention) -> bool:
    """Whether something between K's projection and the scores knows the basis of K.

    Args:
        names: the tensors of the checkpoint, a set or a mapping.
    """
    stack = layer.stack
    own = [name for norm in stack.norms if norm.of == "k" for name in norm_tensors(layer, norm, layer.kv_heads)]
    shared = [layer.name(module) for module in SHARED_NORMS] if stack.shared_qk_norm else []
    return layer.keys_fixed or any(name in names for name in (*own, *shared))


def unaccounted(names: Sequence[str], layer: LayerAttention, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Tensors of an attention that its row says nothing of.

    Args:
        names: the tensors of the checkpoint, sorted.
        shapes: theirs.
    """
    stack = layer.stack
    modules = [*(p.module for p in stack.projections), stack.output]
    exact = {f"{module}.{what}" for module in modules for what in ("weight", "bias")} | set(BUFFERS)
    exact |= {stack.sinks} if stack.sinks else set()
    below = (*(norm.module for norm in stack.norms), *stack.others, *(SHARED_NORMS if stack.shared_qk_norm else ()))
    starts = tuple(f"{module}." for module in below)
    return [
        layer.prefix + name
        for name in tensors_below(names, layer.prefix)
        if name not in exact
        and name not in below
        and not name.startswith(starts)
        and not (name == "bias" and len(shapes[layer.prefix + name]) == 4)  # GPT-2's causal mask
    ]


def refuse_unaccounted(shapes: Mapping[str, Sequence[int]], layers: Iterable[LayerAttention], method: str) -> None:
    """Raise if an attention that changes has tensors that its row says nothing of.

    Raises:
        ConversionError: names them.
    """
    names = sorted(shapes)
    for layer in layers:
        unknown = unaccounted(names, layer, shapes) if layer.changes else []
        if unknown:
            shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            raise ConversionError(
                f"the row of this family does not account for {shown}: method {method} turns keys, values and outputs "
                "into another basis, and what stands between them would make that wrong without a word; use --method "
                "mean, or say in the row what it is (docs/extending.md)"
            )
