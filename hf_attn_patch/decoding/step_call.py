"""The arguments of one decoding step: whether it can be recorded, and what must be the same for a recording to fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.utils import ModelOutput

from hf_attn_patch.attn.choice import asked_for
from hf_attn_patch.cache.growing_cache import GrowingCache
from hf_attn_patch.compat.torch import operators_are_watched

from .outputs import UnfitError

CONSTANT = 1 << 18  # inputs of more elements are used where they are, not copied


def growing_of(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


class StepCall:
    """The arguments of one decoding step, sorted: what is copied, what is used where it is, what must stay the same.

    Raises:
        UnfitError: this call is not a step that can be recorded.
    """

    def __init__(self, kwargs: dict[str, Any], cache_name: str) -> None:
        self.kwargs, self.cache_name = kwargs, cache_name
        self.copied: dict[str, Tensor] = {}
        cache = kwargs[cache_name]
        growing = growing_of(cache)
        if type(growing) is not GrowingCache:
            raise UnfitError(f'its cache is a {type(growing).__name__} and no GrowingCache: enable(cache="growing")')
        tokens = new_tokens(kwargs, cache)
        if tokens is None:
            raise UnfitError("it is given neither ids nor embeddings")
        self.device, self.tokens = tokens.device, tokens
        self.tokens_name = next(name for name, value in kwargs.items() if value is tokens)
        decoder = "decoder_" if isinstance(cache, EncoderDecoderCache) else ""
        self.mask_name = f"{decoder}attention_mask"
        self.mask: Any = kwargs.get(self.mask_name)
        if self.mask is not None and (
            not isinstance(self.mask, Tensor) or self.mask.dim() != 2 or self.mask.device != self.device
        ):
            raise UnfitError(f"its {self.mask_name} is not [B, S] on its tokens' device")
        if self.mask is None and isinstance(cache, EncoderDecoderCache):
            # these decoders would make one themselves, from a length on the host
            seen = growing_of(cache).get_seq_length()
            self.mask = torch.ones(tokens.shape[0], seen + 1, dtype=torch.int64, device=self.device)
            kwargs = self.kwargs = {**kwargs, self.mask_name: self.mask}
        signature: list[Any] = []
        for name, value in kwargs.items():
            if name == cache_name:
                continue
            if name == self.mask_name and value is not None:
                signature.append((name, value.shape[0], value.dtype))
            elif isinstance(value, Tensor) and (value.numel() <= CONSTANT or value is tokens):
                if value.requires_grad or value.device != self.device:
                    raise UnfitError(f"{name} is on another device than its tokens, or needs a gradient")
                self.copied[name] = value
                signature.append((name, value.shape, value.dtype))
            else:
                signature.append((name, _constant(name, value)))
        if isinstance(cache, EncoderDecoderCache):
            signature.append(_cross(cache))
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise UnfitError("output_attentions and output_hidden_states are not recorded")
        device = self.device.type
        if torch.is_autocast_enabled(device) or (device == "cuda" and torch.cuda.is_current_stream_capturing()):
            raise UnfitError("autocast keeps copies of weights, and a recording does not go into another")
        if operators_are_watched():
            raise UnfitError("a mode looks at each operator (a counter of FLOPs, say), which a recording does not run")
        signature += [
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            asked_for(),
            torch.cuda.current_stream(self.device).cuda_stream if device == "cuda" else None,
        ]
        self.signature = tuple(signature)


def new_tokens(kwargs: dict[str, Any], cache: Any) -> Tensor | None:
    """The ids [B, S] or embeddings [B, S, E] that a call with a cache brings."""
    decoder = "decoder_" if isinstance(cache, EncoderDecoderCache) else ""
    for name in ("input_ids", "inputs_embeds"):
        tokens = kwargs.get(decoder + name)
        if isinstance(tokens, Tensor) and tokens.dim() > 1:
            return tokens
    return None


def is_prompt(kwargs: dict[str, Any], cache: Any) -> bool:
    """Whether a call is no decoding step: not one token a row, or none before it."""
    tokens = new_tokens(kwargs, cache)
    if (tokens is not None and tokens.shape[1] != 1) or kwargs.get("use_cache") is False:
        return True
    layers = getattr(growing_of(cache), "layers", None)
    return layers is not None and not any(getattr(layer, "is_initialized", True) for layer in layers)


def _constant(name: str, value: Any) -> Any:
    """What must be the same for a recorded step to be the right one."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    if isinstance(value, (ModelOutput, tuple, list)):
        values = value.values() if isinstance(value, ModelOutput) else value
        return tuple(_constant(name, v) for v in values)
    raise UnfitError(f"{name} is a {type(value).__name__}")


def _cross(cache: EncoderDecoderCache) -> Any:
    """The keys and values of cross-attention: they must be there, and stay where they are."""
    if not cache.is_updated or not all(cache.is_updated.values()):
        raise UnfitError("the encoder's keys are not cached yet")
    return tuple(
        _constant("cross-attention", (layer.keys, layer.values)) for layer in cache.cross_attention_cache.layers
    )
