"""The mask function that transformers calls: its request becomes a :class:`Pattern`, or None where all is seen."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from hf_attn_patch.attn import memo
from hf_attn_patch.attn.visibility import Dense
from hf_attn_patch.compat.ground import changed
from hf_attn_patch.compat.layer_keywords import named_by
from hf_attn_patch.compat.mask_functions import taken_apart
from hf_attn_patch.compat.torch import operators_are_watched
from hf_attn_patch.compat.transformers import attention_name, goes_through_interface
from hf_attn_patch.errors import AttentionError

from .attention_function import NAME, unknown_way
from .call_visibility import keep_visibility, leave_open
from .mask_pattern import Pattern

#: families whose layers read or extend the mask that they are given (scores of their own, routers, attention in their
#: own code beside the interface): they get what eager would get
EXTENDS_MASKS = frozenset(
    {"bigbird_pegasus", "deepseek_v4", "doge", "gemma4_audio", "git", "informer", "lasr_encoder", "nllb-moe"}
)

#: families whose last layers see some of the queries alone, with their rows of the mask (from transformers 5.23 on)
SLICES_MASKS = frozenset({"gemma4_text", "gemma4_unified_text"})

#: what transformers hands to every mask function besides, by its names
FURTHER = frozenset({"config", "dtype", "local_size", "use_vmap", "allow_torch_fix"})


def build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Registered with transformers' ``AttentionMaskInterface``; called once per pattern and forward.

    Returns:
        None where everything is seen; bool [B, 1, 1, Sk] for one query; else a carrier (see ``mask_pattern.py``); bool
        [B, 1, Sq, Sk] for patterns that are not made of intervals, and where the caller wants to work on the mask
        itself; float for those of ``EXTENDS_MASKS``. Under torch.compile uint8 [B, 1, Sq, Sk]: ours, to which borders
        of documents may be added.
    """
    _refuse_unheard(kwargs)
    mask_function = masking_utils.causal_mask_function if mask_function is None else mask_function
    stock = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "device": device,
        **kwargs,
    }
    config = kwargs.get("config")
    if getattr(config, "model_type", None) in EXTENDS_MASKS:
        return masking_utils.eager_mask(**stock)
    if torch.compiler.is_compiling():
        mask = masking_utils.sdpa_mask(
            **stock,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        )
        return mask if mask is None or q_length == 1 else mask.to(torch.uint8)
    if config is not None and attention_name(config) == NAME:
        _refuse_family(type(config).__module__)
    parts = read_mask_function(mask_function)
    packed_by_caller = parts is not None and parts.get("documents") is not None
    static = isinstance(q_offset, Tensor)
    causal = is_causal(mask_function) if parts is None else parts["causal"]
    may_skip = allow_is_causal_skip if causal else allow_is_bidirectional_skip
    # transformers forbids skipping where it adds a function of the caller's, and that function is read here
    added = causal and bool(kwargs.get("use_vmap"))
    if parts is None or not (may_skip or added or packed_by_caller or static or q_length == 1):
        return _dense(stock, causal, untouched=parts is None)
    pattern = _pattern(stock, parts)
    if q_length == 1:
        with memo.counted():
            mask = _one_query(pattern, not may_skip and (static or not added))
        if mask is not None:
            keep_visibility(mask, Dense(batch_size, 1, kv_length, mask=mask.detach()))
        return mask
    # None leaves causality to the module's flag, which not every family sets: only "sees everything" may be None
    says_everything = not causal and getattr(config, "is_causal", None) is not False
    if says_everything and pattern.is_plain():
        return None
    return pattern.sliceable() if getattr(config, "model_type", None) in SLICES_MASKS else pattern.carrier()


def _refuse_unheard(further: dict[str, Any]) -> None:
    if unheard := [name for name, value in further.items() if name not in FURTHER and value is not None]:
        raise changed("transformers", f"what is handed to a mask function ({', '.join(unheard)})")


def _pattern(stock: dict[str, Any], parts: dict[str, Any]) -> Pattern:
    """What was asked for (``stock``: by transformers' names) and what the mask function closes over, as one pattern."""
    q_offset, kv_offset, kv_length = stock["q_offset"], stock["kv_offset"], stock["kv_length"]
    watched = operators_are_watched()  # whoever writes them down cannot write down a number
    if isinstance(q_offset, Tensor):
        stays = q_offset.device.type != "cpu" or watched
        q_offset = q_offset.clone() if stays else int(q_offset)  # which moves on
    if isinstance(kv_offset, Tensor) and kv_offset.device.type == "cpu" and not watched:
        kv_offset = int(kv_offset)
    return Pattern(
        stock["batch_size"],
        stock["q_length"],
        kv_length,
        causal=parts["causal"],
        window=parts["window"],
        offset=q_offset - kv_offset,
        kv_offset=kv_offset,
        chunk=parts.get("chunk"),
        keys=_valid_keys(stock["attention_mask"], kv_length, kv_offset),
        documents=parts.get("documents"),
        device=torch.device(stock["device"]),
    )


def _dense(stock: dict[str, Any], causal: bool, untouched: bool) -> Tensor:
    """The mask written out, [B, 1, Sq, Sk]. Causal ones are left open: layers see the positions, and with them the
    documents, which transformers looks for only where there is neither a cache nor a 2-D mask.

    Args:
        causal: so that positions which go back begin a document. Of a function that nobody here made this is read off
            what it says, which waits for the device.
        untouched: the mask goes to the layers as it is; it is uint8 then, which a copy to another device stays. A
            caller that works on the mask gets a bool one, open as long as nothing is made of it.
    """
    mask = masking_utils.sdpa_mask(**stock, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    assert mask is not None
    if stock["q_length"] == 1 or not (causal or _hides_what_follows(mask, stock)):
        return mask
    mask = mask.to(torch.uint8) if untouched else mask
    kv_offset = stock["kv_offset"]
    if isinstance(kv_offset, Tensor) and kv_offset.device.type == "cpu":
        kv_offset = int(kv_offset)
    leave_open(mask, _valid_keys(stock["attention_mask"], stock["kv_length"], kv_offset))
    return mask


def _hides_what_follows(mask: Tensor, stock: dict[str, Any]) -> bool:
    """Whether a written-out mask that somebody's own function made lets nobody see a later key."""
    if taken_apart(stock["mask_function"]) is not None or type(mask) is not Tensor or memo.capturing(mask.device):
        return False
    return not bool(mask.triu(int(stock["q_offset"] - stock["kv_offset"]) + 1).any())


def _refuse_family(config_module: str) -> None:
    """Before its own code meets a carrier: a family that could not run anyway."""
    if outside := _outside(config_module):
        raise AttentionError(
            f"{outside} computes attention in its own code, outside transformers' attention interface, and cannot read "
            'the masks of hf_attn_patch; load it with attn_implementation="eager"'
        )
    if selecting := _selecting(config_module):
        raise unknown_way(selecting, "indices")


@cache
def _selecting(config_module: str) -> str | None:
    """The name of a layer of this config's family that chooses keys by scores of its own, from the mask that it reads,
    and hands over which (DeepSeek-V3.2 and its kin); None if there is none."""
    module = sys.modules.get(config_module.replace(".configuration_", ".modeling_"))
    if module is None or not config_module.startswith("transformers."):
        return None
    try:
        if "indices=" not in inspect.getsource(module):
            return None
    except (OSError, TypeError):  # no source
        return None
    layers: list[type] = [v for v in vars(module).values() if inspect.isclass(v) and issubclass(v, torch.nn.Module)]
    return next((layer.__name__ for layer in layers if "indices" in named_by(layer)), None)


@cache
def _outside(config_module: str) -> str | None:
    """The name of a model of this config's family, if its modeling file does not ask the attention interface."""
    from transformers.modeling_utils import PreTrainedModel  # not above: its import is what imports this module

    name = config_module.replace(".configuration_", ".modeling_")
    if name == config_module:  # a family of ours, or code of its own that transformers' heuristic was not made for
        return None
    for value in vars(sys.modules[name]).values() if name in sys.modules else ():
        if inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.__module__ == name:
            inside = goes_through_interface(value)
            return None if inside else value.__name__.replace("PreTrainedModel", "")
    return None


def _one_query(pattern: Pattern, always: bool) -> Tensor | None:
    """Bool [B, 1, 1, Sk]; None if the one query sees everything, unless the caller works on the mask (``always``)."""
    offset, (left, right) = pattern.offset, pattern.window
    last = isinstance(offset, int) and offset == pattern.kv_len - 1  # the query sits at the last key
    reaches = left is None or left >= pattern.kv_len - 1
    unbounded = (not pattern.causal and right is None) or last
    if unbounded and reaches and pattern.chunk is None and pattern.documents is None:
        if pattern.keys is not None:
            return pattern.keys[:, None, None, :]
        if not always:
            return None
    return pattern.dense().expand(pattern.batch, 1, 1, pattern.kv_len)


def _valid_keys(attention_mask: Tensor | None, kv_length: int, kv_offset: int | Tensor) -> Tensor | None:
    """Bool [B, Sk] of the keys in this call, or None if all are valid (asked only where asking is free).

    In memory of their own: the caller may write to its mask, and what is kept with ours is to know.
    """
    if attention_mask is None:
        return None
    with memo.counted():
        return _keys_of(attention_mask, kv_length, kv_offset)


def _keys_of(attention_mask: Tensor, kv_length: int, kv_offset: int | Tensor) -> Tensor | None:
    if isinstance(kv_offset, Tensor):  # nobody waits for it: the keys are picked on the device
        index = torch.arange(kv_length, device=kv_offset.device) + kv_offset
        last = attention_mask.shape[-1] - 1
        return attention_mask.bool()[:, index.clamp(max=last)] & (index <= last)
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    keys = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool, copy=True)
    looks = keys.device.type == "cpu" and not operators_are_watched()
    return None if looks and bool(keys.all()) else keys


def read_mask_function(function: Callable[..., Any]) -> dict[str, Any] | None:
    """What a transformers mask function is made of: causal, window, chunk, documents; None if it is anything else.

    Raises:
        AttentionError: it holds a function of transformers' own that is not known.

    >>> read_mask_function(masking_utils.sliding_window_causal_mask_function(4))
    {'causal': True, 'window': (3, None)}
    """
    known = taken_apart(function)
    if known is None:
        return None
    name, values = known
    inner = [read_mask_function(part) for part in _parts_of(function)]
    seen: dict[str, Any] = {"causal": False, "window": (None, None)}
    if name == "causal_mask_function":
        return {**seen, "causal": True}
    if name == "bidirectional_mask_function":
        return seen
    if name == "and_masks":
        return _intersection(inner)
    if name == "sliding_window_overlay":
        return {**seen, "window": (values["sliding_window"] - 1, None)}
    if name == "sliding_window_bidirectional_overlay":
        return {**seen, "window": (values["sliding_window"], values["sliding_window"])}
    if name == "chunked_overlay":
        return {**seen, "chunk": (values["chunk_size"], values["left_padding"])}
    if name == "packed_sequence_mask_function":
        return {**seen, "documents": values["packed_sequence_mask"]}
    if name == "remap_positions_for_packed_sequence" and inner[0] is not None and "chunk" not in inner[0]:
        return inner[0]  # positions counted inside each document: distances stay the same, so only chunks would change
    return None  # unions and blocks are no intervals


def _parts_of(function: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """The mask functions that one of transformers' is made of."""
    known = taken_apart(function)
    if known is None:
        return ()
    if "mask_function" in known.values:
        return (known.values["mask_function"],)
    return tuple(known.values.get("mask_functions", ()))


def is_causal(function: Callable[..., Any]) -> bool:
    """Whether causality is a part of a mask function.

    >>> is_causal(masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 3))
    True
    """
    known = taken_apart(function)
    return known is not None and (
        known.name == "causal_mask_function" or any(is_causal(part) for part in _parts_of(function))
    )


def _intersection(parts: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    result: dict[str, Any] = {"causal": False, "window": (None, None)}
    for part in parts:
        if part is None or any(key in result and key in part for key in ("chunk", "documents")):
            return None
        bounds = zip(result["window"], part["window"], strict=True)
        merged = tuple(min((x for x in pair if x is not None), default=None) for pair in bounds)
        result = {**result, **part, "causal": result["causal"] or part["causal"], "window": merged}
    return result
