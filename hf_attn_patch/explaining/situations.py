"""Inputs that put a model of any kind into a situation: its forwards, one after another.

The tensors are real and small: token ids, masks, positions. Images and sounds are empty meta tensors of the size that
the config names.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_patch.compat.cache_keyword import NAMES
from hf_attn_patch.compat.calls import cache_of
from hf_attn_patch.errors import AttentionError

#: what one forward is called with -> what it gave
Forwards = Generator[dict[str, Any], Any, None]


@dataclass(frozen=True)
class Situation:
    """Of which forward is asked: B rows; Sq queries after a cache of Sk - Sq keys."""

    batch: int
    q_len: int
    kv_len: int
    padded: bool
    packed: bool
    training: bool

    @property
    def past(self) -> int:
        return self.kv_len - self.q_len

    def mask(self, length: int, left: bool) -> Tensor | None:
        """int64 [B, length]: a quarter of each row but the first is padding (of the only row, if there is one)."""
        if not self.padded:
            return None
        mask = torch.ones(self.batch, length, dtype=torch.int64)
        most = length // 4 if self.past < 2 else min(length // 4, self.past - 1)
        pad = min(max(1, most), length - 1)
        rows = mask[1:] if self.batch > 1 else mask
        (rows[:, :pad] if left else rows[:, length - pad :]).zero_()
        return mask

    def positions(self, length: int) -> Tensor | None:
        """int64 [B, length]: two documents in each row."""
        if not self.packed:
            return None
        first = (length + 1) // 2
        return torch.cat([torch.arange(first), torch.arange(length - first)])[None].repeat(self.batch, 1)


def forwards(model: Any, s: Situation) -> Forwards:
    """The forwards that put ``model`` into the situation ``s``; the last is the one that is asked about."""
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    if s.packed and "position_ids" not in takes and "input_ids" in takes:
        raise AttentionError(
            f"{type(model).__name__} takes no position_ids, by which packed documents are told apart; "
            "ask without packed=True, or with inputs= as you call it"
        )
    if "decoder_input_ids" in takes and (model.config.is_encoder_decoder or main != "input_ids"):
        yield from _encoder_decoder(model, s, takes, main)
    elif "input_ids" in takes:
        yield from _text(model, s, takes)
    else:
        yield _signal(model, s, takes, main)


def text_of(config: Any) -> Any:
    """The config of a model's text; of several (MusicGen: a T5 that reads, a decoder that makes sound) the decoder's.

    >>> from transformers import MusicgenConfig
    >>> text_of(MusicgenConfig()).model_type
    'musicgen_decoder'
    """
    try:
        return config.get_text_config()
    except ValueError:  # it has several
        return config.get_text_config(decoder=True)


def token(config: Any) -> int:
    """A token id that means nothing special to the model."""
    text = text_of(config)
    special = {value for part in (config, text) for value in vars(part).values() if isinstance(value, int)}
    return next(n for n in itertools.count(1) if n not in special)


def _text(model: nn.Module, s: Situation, takes: Any) -> Forwards:
    decoder = bool(getattr(model.config, "is_decoder", False)) or not _is_encoder(model)
    ids = torch.full((s.batch, s.kv_len), token(model.config))
    mask = s.mask(s.kv_len, left=decoder and not s.training)
    positions = s.positions(s.kv_len)
    cache = next((name for name in NAMES if name in takes), None)
    if s.past and cache is not None:
        out = yield _given(input_ids=ids[:, : s.past], attention_mask=None if mask is None else mask[:, : s.past],
                           use_cache=True)  # fmt: skip
        if (kept := cache_of(out)) is not None:
            yield _given(**{"input_ids": ids[:, s.past :], "attention_mask": mask, cache: kept, "use_cache": True})
            return
    yield _given(input_ids=ids, attention_mask=mask, position_ids=positions)


def _encoder_decoder(model: nn.Module, s: Situation, takes: Any, main: str) -> Forwards:
    if main == "input_ids":
        ids = torch.full((s.batch, s.kv_len), token(model.config))
        source = _given(input_ids=ids, attention_mask=s.mask(s.kv_len, left=False))
    else:
        source = _signal(model, s, takes, main)
    ids = torch.full((s.batch, s.kv_len), token(model.config))
    mask = s.mask(s.kv_len, left=False)
    cache = next((name for name in NAMES if name in takes), None)
    if s.past and cache is not None:
        before = None if mask is None else mask[:, : s.past]
        out = yield _given(**source, decoder_input_ids=ids[:, : s.past], decoder_attention_mask=before)
        if (kept := cache_of(out)) is not None:
            from transformers.modeling_outputs import BaseModelOutput

            encoded = BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
            encoded.router_logits = None  # of mixtures of experts
            rest = {name: value for name, value in source.items() if name == "attention_mask"}
            yield _given(**rest, encoder_outputs=encoded, decoder_input_ids=ids[:, s.past :],
                         decoder_attention_mask=mask, **{cache: kept})  # fmt: skip
            return
    yield _given(**source, decoder_input_ids=ids, decoder_attention_mask=mask)


def _signal(model: nn.Module, s: Situation, takes: Any, main: str) -> dict[str, Any]:
    """Images or sounds of the size that the config names."""
    config: Any = model.config
    if main == "pixel_values" and "pixel_values" in takes:
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {main: _empty(s.batch, getattr(config, "num_channels", 3), height, width)}
    if "grid_thw" in takes:  # patches of all images in one row
        merge = getattr(config, "spatial_merge_size", 1)
        side = merge * max(1, 32 // merge)
        width = getattr(config, "in_channels", 3) * config.temporal_patch_size * config.patch_size**2
        grid = torch.tensor([[1, side, side]]).repeat(s.batch, 1)
        first = next(iter(takes))
        return {first: _empty(s.batch * side * side, width), "grid_thw": grid}
    if main == "input_values":
        length = s.kv_len
        for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
            length = (length - 1) * stride + kernel
        mask = s.mask(s.kv_len, left=False)
        if mask is not None:
            lengths = mask.sum(-1, keepdim=True) * (length // s.kv_len)
            mask = (torch.arange(length) < lengths).long()
            mask[0] = 1 if s.batch > 1 else mask[0]
        return _given(input_values=_empty(s.batch, length), attention_mask=mask)
    if main == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return {main: _empty(s.batch, config.num_mel_bins, 2 * config.max_source_positions)}
    if main == "input_features" and hasattr(config, "feature_projection_input_dim"):
        features = _empty(s.batch, s.kv_len, config.feature_projection_input_dim)
        return _given(input_features=features, attention_mask=s.mask(s.kv_len, left=False))
    raise TypeError(f"takes {main} of a form that is not known here; ask with inputs= as you call the model")


def _is_encoder(model: nn.Module) -> bool:
    causal = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return bool(causal) and not any(causal)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _given(**inputs: Any) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if value is not None}
