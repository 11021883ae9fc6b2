"""A model's way from hidden states to logits, taken apart so that the logits need not be made."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .chunked import Head


def head_of(model: Any) -> Head:
    """The head of a causal or sequence-to-sequence model, as its config and its output embeddings describe it.

    Call it inside the forward of a sharded model: only there is the weight whole.
    """
    config = model.config.get_text_config(decoder=True)
    embeddings = model.get_output_embeddings()
    bias = getattr(embeddings, "bias", None)
    if bias is None and hasattr(model, "final_logits_bias"):  # BART keeps it beside the head
        bias = model.final_logits_bias.reshape(-1)
    scale = 1.0
    if getattr(config, "logit_scale", None):  # Cohere
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None):  # Granite
        scale = 1.0 / float(config.logits_scaling)
    elif getattr(config, "scale_decoder_outputs", False):  # T5 with a head tied to its embeddings
        scale = float(config.d_model) ** -0.5
    return Head(embeddings.weight, bias, scale, getattr(config, "final_logit_softcapping", None))


def head_matches(hidden: Tensor, head: Head, logits: Tensor, tolerance: float = 2e-2) -> bool:
    """Whether ``head`` makes the model's own ``logits`` [T, V] out of ``hidden`` [T, E].

    >>> import torch
    >>> h, w = torch.randn(3, 4), torch.randn(7, 4)
    >>> head_matches(h, Head(w), h @ w.T), head_matches(h, Head(w), 2 * h @ w.T)
    (True, False)
    """
    ours = head.logits(hidden)
    if ours.shape != logits.shape:
        return False
    scale = logits.float().abs().max().clamp(min=1e-6)
    return bool(((ours - logits.float()).abs().max() / scale) < tolerance)
