"""Inputs for the tiny models of ``families.py``, from a padding mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from families import FIRST_TOKEN, PAD, VOCAB, Family

#: 2-D padding patterns, by name: which of S positions of the rows of a batch hold a token.
PADDINGS = ("none", "ones", "left", "right", "two-sided", "holes", "empty-row")


def padding_mask(pattern: str, S: int) -> torch.Tensor | None:
    """[B, S] int64, 1 where there is a token; None for "none". Batch row 0 is always full."""
    if pattern == "none":
        return None
    mask = torch.ones(3, S, dtype=torch.int64)
    if pattern == "left":
        mask[1, :3], mask[2, :1] = 0, 0
    elif pattern == "right":
        mask[1, -4:], mask[2, -1:] = 0, 0
    elif pattern == "two-sided":
        mask[1, :2], mask[1, -3:], mask[2, :1], mask[2, -2:] = 0, 0, 0, 0
    elif pattern == "holes":
        mask[1, 2:3], mask[1, -3:-1], mask[2, :1], mask[2, -4:-3] = 0, 0, 0, 0
    elif pattern == "empty-row":
        mask[1], mask[2, -2:] = 0, 0
    else:
        assert pattern == "ones", pattern
    return mask


@dataclass
class Inputs:
    """What a model is called with, and which rows of which outputs count (None: all)."""

    kwargs: dict[str, Any]
    rows: dict[str, torch.Tensor | None]


def tokens(B: int, S: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(FIRST_TOKEN, VOCAB, (B, S), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded_tokens(mask: torch.Tensor | None, S: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    ids = tokens(3 if mask is None else mask.shape[0], S, seed)
    return (ids if mask is None else ids.masked_fill(mask == 0, PAD)), (None if mask is None else mask.bool())


def make_inputs(family: Family, padding: str = "none", *, S: int = 14, S_decoder: int = 9, seed: int = 0) -> Inputs:
    """Inputs of the family's kind. Masks that are None are left out of the call, as a user would."""
    kwargs, rows = _MAKERS[family.kind](family, padding, S, S_decoder, seed)
    return Inputs({name: value for name, value in kwargs.items() if value is not None}, rows)


def takes_padding(family: Family, padding: str) -> bool:
    """Whether the family can be called with this pattern (Qwen2-VL's own code fails on a row without tokens)."""
    return padding == "none" or (family.kind != "vision" and (family.kind, padding) != ("patches-chat", "empty-row"))


def _decoder(family: Family, padding: str, S: int, S_decoder: int, seed: int) -> Any:
    mask = padding_mask(padding, S)
    ids, valid = padded_tokens(mask, S, seed)
    return {"input_ids": ids, "attention_mask": mask}, {"logits": valid}


def _encoder(family: Family, padding: str, S: int, S_decoder: int, seed: int) -> Any:
    mask = padding_mask(padding, S)
    ids, valid = padded_tokens(mask, S, seed)
    return {"input_ids": ids, "attention_mask": mask}, {"last_hidden_state": valid}


def _encoder_decoder(family: Family, padding: str, S: int, S_decoder: int, seed: int) -> Any:
    mask, decoder_mask = padding_mask(padding, S), padding_mask(padding, S_decoder)
    ids, valid = padded_tokens(mask, S, seed)
    decoder_ids, decoder_valid = padded_tokens(decoder_mask, S_decoder, seed + 1)
    return (
        {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": decoder_ids,
            "decoder_attention_mask": decoder_mask,
        },
        {"encoder_last_hidden_state": valid, "logits": decoder_valid},
    )


def _vision(family: Family, padding: str, S: int, S_decoder: int, seed: int) -> Any:
    return {"pixel_values": normal(2, 3, 16, 16, seed=seed)}, {"last_hidden_state": None}


def _text_vision(family: Family, padding: str, S: int, S_decoder: int, seed: int) -> Any:
    mask = padding_mask(padding, S)
    ids, valid = padded_tokens(mask, S, seed)
    kwargs = {"input_ids": ids, "attention_mask": mask, "pixel_values": normal(3, 3, 16, 16, seed=seed)}
    return kwargs, {"text_model_output.last_hidden_state": valid, "vision_model_output.last_hidden_state": None}


def _image_chat(family: Family, padding: str, S: int, S_decoder: int, seed: int) -> Any:
    S += 16  # one image of 4 x 4 patches, away from both ends
    mask = padding_mask(padding, S)
    ids, valid = padded_tokens(mask, S, seed)
    ids[:, 6:22] = family.options["image_token_index"]
    kwargs = {"input_ids": ids, "attention_mask": mask, "pixel_values": normal(3, 3, 16, 16, seed=seed)}
    if family.name == "gemma3":
        kwargs["token_type_ids"] = (ids == family.options["image_token_index"]).long()
    return kwargs, {"logits": valid}


def _patches_chat(family: Family, padding: str, S: int, S_decoder: int, seed: int) -> Any:
    S += 8
    mask = padding_mask(padding, S)
    ids, valid = padded_tokens(mask, S, seed)
    grids = torch.tensor([[1, 4, 4], [1, 2, 8], [1, 6, 4]])  # images of different sizes: 4, 4 and 6 tokens once merged
    for row, grid in enumerate(grids):
        ids[row, 5], ids[row, 6 : 6 + int(grid.prod()) // 4] = 7, family.options["image_token_id"]
    kwargs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": normal(int(grids.prod(-1).sum()), 3 * 2 * 4 * 4, seed=seed),
        "image_grid_thw": grids,
        "mm_token_type_ids": (ids == family.options["image_token_id"]).int(),
    }
    return kwargs, {"logits": valid}


def _speech(family: Family, padding: str, S: int, S_decoder: int, seed: int) -> Any:
    # two convolutions (kernels 8, 4; strides 4, 4) make S frames of 16 * S + 8 samples
    mask = padding_mask(padding, S)
    samples = None if mask is None else torch.cat([mask.repeat_interleave(16, 1), mask[:, -1:].expand(-1, 8)], dim=1)
    values = normal(3, 16 * S + 8, seed=seed)
    # the feature encoder of these models counts tokens from the left, so only right padding means anything to it
    valid = None if samples is None else (torch.arange(S)[None] < _frames(samples.sum(-1))[:, None])
    return {"input_values": values, "attention_mask": samples}, {"last_hidden_state": valid}


def _frames(samples: torch.Tensor) -> torch.Tensor:
    for kernel, stride in ((8, 4), (4, 4)):
        samples = (samples - kernel) // stride + 1
    return samples


def _features(family: Family, padding: str, S: int, S_decoder: int, seed: int) -> Any:
    mask = padding_mask(padding, S)
    valid = None if mask is None else mask.bool()
    return {"input_features": normal(3, S, 24, seed=seed), "attention_mask": mask}, {"last_hidden_state": valid}


def _speech_to_text(family: Family, padding: str, S: int, S_decoder: int, seed: int) -> Any:
    mask = padding_mask(padding, S_decoder)
    ids, valid = padded_tokens(mask, S_decoder, seed)
    kwargs = {
        "input_features": normal(3, 8, 24, seed=seed),
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
    }
    return kwargs, {"encoder_last_hidden_state": None, "logits": valid}


_MAKERS = {
    "decoder": _decoder,
    "encoder": _encoder,
    "encoder-decoder": _encoder_decoder,
    "vision": _vision,
    "text-vision": _text_vision,
    "image-chat": _image_chat,
    "patches-chat": _patches_chat,
    "speech": _speech,
    "features": _features,
    "speech-to-text": _speech_to_text,
}
