"""torch.compile, one decoder layer at a time.

All layers of a model share one compiled graph (their weights are its inputs), so compiling takes as long for 80 layers
as for one. Attention runs between the compiled pieces: kernels of FlashAttention can't be traced.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_attn_patch.compat.torch import compile_module
from hf_attn_patch.compat.transformers import attention_name
from hf_attn_patch.hf.attention_function import NAME, attention_forward

from .trainable import layers_of

#: our attention, called from compiled code but not compiled
UNTRACED = f"{NAME}_untraced"
#: graphs of one layer: students and teachers, with and without gradients, training and evaluation; past 8, which is its
#: own limit, dynamo would give up unheard
FORMS = 64


def compile_layers(model: Any, *, one_shape: bool) -> int:
    """Compile each layer of ``model`` in place; what was not called yet is compiled at its first call.

    Args:
        one_shape: batches have one shape (packed ones do), which makes faster code than any shape's.

    Returns:
        how many layers there are.
    """
    if attention_name(model.config) == NAME:
        _register()
        model.set_attn_implementation(UNTRACED)
    layers = layers_of(model)
    for layer in layers:
        # what is checkpointed is traced whole or not at all, and attention is not: then its surroundings by themselves
        parts = list(layer.children()) if getattr(layer, "gradient_checkpointing", False) else [layer]
        for part in parts:
            compile_module(part, dynamic=False if one_shape else None, recompile_limit=FORMS)
    return len(layers)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    from hf_attn_patch.hf.mask_function import build_mask

    AttentionInterface.register(UNTRACED, torch.compiler.disable(attention_forward))
    AttentionMaskInterface.register(UNTRACED, build_mask)
