"""Whether a model computes the same on packed rows as on padded ones: tried out before :func:`unpadded` is used.

A padded forward of three short rows is compared with the packed one, words of one row are exchanged to see whether they
are felt in another, and so is the cache that both leave.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_attn_patch.compat.calls import cache_of
from hf_attn_patch.compat.transformers import attention_name

Unpadded = Any  # unpadding.py's, which imports this file

#: how a padded forward numbers its tokens when it gets no position_ids: by column (Llama, GPT-2, BERT), by counting the
#: real tokens (OPT), or by counting ids that are not padding, from padding_idx on (RoBERTa)
NUMBERINGS = ("columns", "counted", "from padding_idx")


def _tolerance(dtype: torch.dtype) -> float:
    """Of the largest output: what rounding alone may do in a deep model."""
    if dtype in (torch.float16, torch.bfloat16):
        return 5e-2
    return 1e-2 if torch.backends.cuda.matmul.allow_tf32 else 1e-3


def _fills_caches(handle: Unpadded, ids: Tensor, mask: Tensor) -> bool:
    """True if a packed forward leaves the cache that a padded one leaves."""
    if not (handle.shifted and handle.arguments.cache and handle.takes_borders):
        return False
    caches = []
    for handle.active in (False, True):
        handle.prefills = handle.active
        cache: Any = DynamicCache(config=handle.model.config)
        output = handle.target(input_ids=ids, attention_mask=mask, use_cache=True, **{handle.arguments.cache: cache})
        if cache_of(output) is not cache:
            return False
        caches.append(
            [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
        )
    padded, packed = caches
    for a, b in zip(padded, packed, strict=True):
        for x, y in zip(a, b, strict=True):
            real = mask[:, -x.shape[2] :] == 1  # a sliding layer keeps the end
            x, y = x.transpose(1, 2)[real].double(), y.transpose(1, 2)[real].double()
            if float((x - y).abs().max()) > _tolerance(handle.target.dtype) * float(x.abs().max()):
                return False
    return len(padded) > 0


#: a row padded on the right, one on the left, a full one
_PROBE = ((1, 1, 1, 1, 0, 0), (0, 0, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1))


@torch.no_grad()
def calibrate(handle: Unpadded) -> None:
    """Find the numbering with which the model computes the same unpadded as padded, or raise ValueError."""
    target, config = handle.target, handle.model.config.get_text_config()
    device = target.get_input_embeddings().weight.device
    if device.type == "meta":
        raise ValueError("unpadded() tries the model out, and this one has no weights yet: load it first")
    mask = torch.tensor(_PROBE, device=device)
    pad = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
    ids = torch.arange(mask.numel(), device=device).view_as(mask) * 7 % (config.vocab_size - 1)
    ids = torch.where(mask == 1, ids + (ids >= pad), pad)
    training = [module for module in target.modules() if module.training]
    target.eval()
    reads_first, handle.reads_first = handle.reads_first, False  # the left-padded row is to be packed as well
    try:

        def run(ids: Tensor = ids) -> Tensor:
            output = target(input_ids=ids, attention_mask=mask, return_dict=True)
            states: Tensor = output["logits" if handle.tokenwise else "last_hidden_state"]
            return states[mask == 1].double()

        handle.active = False
        expected = run()
        handle.active = True
        tolerance = _tolerance(target.dtype) * float(expected.abs().max())
        # Words of the middle row must not be felt in the others, however little: weak weights let through less than
        # rounding does. (Experts sum in an order that depends on all words: fp32 is not exact.)
        changed = ids.clone()
        changed[1] = torch.where(mask[1] == 1, ids[2], ids[1])
        row = torch.arange(len(mask), device=device)[:, None].expand(mask.shape)[mask == 1]
        felt_at_most = tolerance / 100 if _tolerance(target.dtype) <= 1e-3 else tolerance
        errors = {}
        for numbering in NUMBERINGS if isinstance(config.pad_token_id, int) else NUMBERINGS[:2]:
            handle.numbering = numbering
            states = run()
            errors[numbering] = float((states - expected).abs().max())
            felt = float((run(changed) - states)[row != 1].abs().max())
            if errors[numbering] <= tolerance and felt <= felt_at_most:
                handle.prefills = _fills_caches(handle, ids, mask)
                return
    finally:
        handle.reads_first = reads_first
        for module in training:
            module.training = True
    raise ValueError(
        f"{type(handle.model).__name__} with attn_implementation={attention_name(handle.model.config)!r} does not "
        f"compute the same on packed rows (off by {min(errors.values()):.2g}; {tolerance:.2g} could be rounding; "
        f"rows differ by {felt:.2g} with the words of another). "
        "An encoder needs an implementation that is given the document borders: hf_attn_patch.enable(model). "
        "Families that mix tokens outside attention (recurrences, convolutions) cannot run unpadded"
    )
