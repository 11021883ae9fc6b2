"""A padded batch through the whole model without its padding tokens.

With a 2-D attention mask every layer of a model computes on padding: projections, MLPs and head, not only attention.
:func:`unpadded` takes the real tokens out once before the model, runs them as one packed row ``[1, T]`` with document
borders (``cu_seq_lens_q/k``, ``max_length_q/k``), and puts the results back into ``[B, S, ...]`` once after it.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from hf_attn_patch.compat.cache_keyword import NAMES as CACHE_NAMES
from hf_attn_patch.compat.calls import Arguments
from hf_attn_patch.compat.transformers import attention_name
from hf_attn_patch.handle import Handle

from .attention_function import NAME
from .padded_rows import IGNORE, PackedPrefill, Packing, pack_rows
from .unpadding_trial import NUMBERINGS, calibrate

__all__ = ["Unpadded", "unpadded"]

logger = logging.getLogger("hf_attn_patch")

PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids", "labels", "shift_labels")
#: heads that work token by token, so that they too run on the packed row. Other heads get padded hidden states.
TOKENWISE_HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification")


class Unpadded(Handle):
    """The handle that :func:`unpadded` returns: a context manager, or ``undo()`` when done."""

    def __init__(self, model: PreTrainedModel, drop_padding_targets: bool) -> None:
        self.model = model
        self.drop_padding_targets = drop_padding_targets
        self.tokenwise = type(model).__name__.endswith(TOKENWISE_HEADS)
        self.shifted = type(model).__name__.endswith(TOKENWISE_HEADS[:2])
        self.target: PreTrainedModel = model if self.tokenwise else model.base_model
        # what reads an encoder's states reads each row's first one, padding or not
        self.reads_first = not self.tokenwise and not any(getattr(m, "is_causal", False) for m in model.modules())
        self.numbering = NUMBERINGS[0]
        self.active = True
        self.prefills = False
        self._said: set[str] = set()
        self.arguments = Arguments(self.target)
        # thread -> what the forward that runs in it needs afterwards: packing, cache, last logits only?, as a tuple?
        self._pending: dict[int, tuple[Packing, DynamicCache | None, bool, bool]] = {}
        hooks = [
            self.target.register_forward_pre_hook(self._before, with_kwargs=True),
            self.target.register_forward_hook(self._after),
        ]

        def undo() -> None:
            for hook in hooks:
                hook.remove()

        super().__init__(undo)

    def _positions(self, given: dict[str, Any], mask: Tensor) -> Tensor:
        """``[B, S]``: what the padded forward would use."""
        positions = given.get("position_ids")
        columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        if positions is not None:
            if positions.dim() != 2:
                raise ValueError(f"unpadded() needs position_ids of [B, S], not {tuple(positions.shape)}")
            return positions.expand(mask.shape)
        if self.numbering == "counted":
            return (mask != 0).cumsum(1) - 1
        if self.numbering == "from padding_idx":
            padding_idx, ids = self.model.config.pad_token_id, given.get("input_ids")
            if ids is None:
                return columns + padding_idx + 1
            return (ids != padding_idx).cumsum(1) * (ids != padding_idx) + padding_idx
        return columns

    @torch.compiler.disable  # sizes depend on the data: a compiled model is compiled around it
    def _before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._pending.pop(threading.get_ident(), None)
        given = self.arguments.by_name(args, kwargs)
        packed = self._packed(given) if given.get("attention_mask") is not None and self.active else None
        if packed is not None:
            return (), packed
        # a cache that came under transformers' other name for it reaches the forward all the same
        return ((), given) if self.arguments.renames(kwargs) else None

    def _packed(self, given: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of the packed forward; None where the call runs as it is."""
        self.arguments.refuse_unknown_cache(given)
        mask, tokens = given["attention_mask"], _tokens(given)
        cache = self._empty_cache(given)
        if cache is None and self._fills(given):
            return None  # what is cached keeps its padded layout
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError("unpadded() needs the 2-D attention_mask [B, S]")
        if tokens is None or tokens.shape[:2] != mask.shape:
            return None  # transformers fills such a mask up, or takes its part
        positions = self._positions(given, mask)
        shifted = self.shifted and given.get("shift_labels") is None
        targets = given.get("labels" if shifted or not self.shifted else "shift_labels") if self.tokenwise else None
        packing = pack_rows(
            mask,
            positions,
            None if self.drop_padding_targets else targets,
            shifted=shifted,
            strict=not self.takes_borders,
        )
        if packing is None:
            return None
        if self.reads_first and not packing.left_aligned:
            self._say(f"{type(self.model).__name__} reads each row's first token, which is padding in this batch")
            return None
        packed = dict(given, attention_mask=None, use_cache=cache is not None, return_dict=True)
        if "position_ids" in self.arguments.names or "position_ids" in given:
            packed["position_ids"] = positions
        last, unserved = _pack(packed, packing)
        if unserved:
            if cache is not None:
                self._say(f"{', '.join(unserved)} cannot be served from packed rows")
                return None
            raise ValueError(f"unpadded() cannot serve {', '.join(unserved)}: call the model outside of it")
        if shifted and packed.get("labels") is not None:
            # the token before is another document's
            packed["labels"] = packed["labels"].index_fill(1, packing.first, IGNORE)
        if cache is not None:
            packed[self.arguments.cache] = PackedPrefill(cache, packing)
        wanted = given.get("return_dict")
        as_tuple = not (self.model.config.return_dict if wanted is None else wanted)
        self._pending[threading.get_ident()] = (packing, cache, last, as_tuple)
        return packed

    def _fills(self, given: dict[str, Any]) -> bool:
        """Whether a call fills a cache, its own or a new one."""
        return given.get(self.arguments.cache) is not None or given.get("use_cache") is True

    def _empty_cache(self, given: dict[str, Any]) -> DynamicCache | None:
        """The cache that a call like generate's first one would fill; None where it has to run as it is, which is said
        if it runs a padded prompt.

        transformers' own masks do not look for documents once there is a cache, so it takes given borders.
        """
        cache, mask, tokens = given.get(self.arguments.cache), given["attention_mask"], _tokens(given)
        if not self._fills(given) or tokens is None or tokens.shape[1] == 1 or given.get("use_cache") is False:
            return None
        if not self.arguments.cache:  # whose name for it nobody here knows
            return None
        if cache is not None and (not isinstance(cache, Cache) or cache.get_seq_length() != 0):
            return None
        if cache is not None and (not isinstance(cache, DynamicCache) or cache.offloading):
            kind = "an offloaded cache" if isinstance(cache, DynamicCache) else f"a {type(cache).__name__}"
            self._say(f"a prompt is packed into a DynamicCache, and this call fills {kind}")
            return None
        if not isinstance(mask, Tensor) or mask.shape != tokens.shape[:2]:
            return None
        if not (self.prefills and self.takes_borders):
            self._say(self._why_no_prefill, mask)
            return None
        return DynamicCache(config=self.model.config) if cache is None else cache

    @property
    def takes_borders(self) -> bool:
        """Whether the attention implementation, ours or one of the flash family, reads document borders from
        ``cu_seq_lens_q/k``."""
        name = str(attention_name(self.model.config))
        return name == NAME or "flash" in name

    @property
    def _why_no_prefill(self) -> str:
        name = attention_name(self.model.config)
        if not self.takes_borders:
            return f"with a cache attn_implementation={name!r} finds no borders: hf_attn_patch.enable(model) does"
        return f"a packed prompt does not leave the cache of a padded one in {type(self.model).__name__}"

    def _say(self, reason: str, mask: Tensor | None = None) -> None:
        """Why a batch runs with its padding: a warning, once for each reason.

        Args:
            mask: [B, S], where it is not known yet whether there is padding at all.
        """
        if reason not in self._said and (mask is None or bool((mask == 0).any())):
            self._said.add(reason)
            logger.warning("unpadded() lets a batch of %s keep its padding: %s", type(self.model).__name__, reason)

    @torch.compiler.disable
    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        pending = self._pending.pop(threading.get_ident(), None)
        if pending is None:
            return None
        packing, cache, last, as_tuple = pending
        for name in list(output.keys()):
            if name in CACHE_NAMES:
                output[name] = cache
            elif name == "logits" and last:
                output[name] = packing.last(output[name])
            elif name != "pooler_output":
                output[name] = packing.unpack(name, output[name])
        if output.get("pooler_output") is not None:
            # a pooler reads each row's first token: of the packed row it saw only the first document's
            pooler = getattr(module, "pooler", None)
            if pooler is None:
                raise ValueError(f"unpadded() cannot redo how {type(module).__name__} pools")
            output["pooler_output"] = pooler(output["last_hidden_state"])
        return output.to_tuple() if as_tuple else output


def _pack(packed: dict[str, Any], packing: Packing) -> tuple[bool, list[str]]:
    """Pack the arguments that are per token, and add the borders.

    Returns:
        whether only the last logits are wanted, and the names of what packed rows cannot serve.
    """
    unserved = ["output_attentions"] if packed.get("output_attentions") else []
    keep = packed.get("logits_to_keep")
    last = isinstance(keep, int) and keep == 1 and packing.right_aligned
    if last:
        packed["logits_to_keep"] = packing.cu_seq_lens[1:].long() - 1
    elif isinstance(keep, Tensor) or keep:
        unserved.append("logits_to_keep")
    for name, value in packed.items():
        if name in PER_TOKEN and value is not None:
            packed[name] = packing.pack(value)
        elif isinstance(value, Tensor) and value.dim() > 0 and name != "logits_to_keep":
            unserved.append(name)
    packed["cu_seq_lens_q"] = packed["cu_seq_lens_k"] = packing.cu_seq_lens
    packed["max_length_q"] = packed["max_length_k"] = packing.max_length
    return last, unserved


def _tokens(given: dict[str, Any]) -> Tensor | None:
    """``[B, S]`` ids or ``[B, S, E]`` embeddings, whichever the call gives."""
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    return tokens if isinstance(tokens, Tensor) else None


def unpadded(model: torch.nn.Module, *, drop_padding_targets: bool = False, check: bool = True) -> Unpadded:
    """Run a model's padded batches without their padding tokens, with the same loss, gradients and outputs.

    For decoder-only language models and encoders, with padding on either side. Token-wise heads (language modelling,
    token classification) run on the real tokens only, others on the encoder's padded output. Outputs are zero at
    padding tokens (a padded forward leaves arbitrary values there). The attention implementation must keep packed
    documents apart: ``"hf_attn_patch"`` and flash attention get the borders; transformers' ``"sdpa"``, ``"eager"`` and
    ``"flex_attention"`` find them by ``position_ids``, in causal models only.

    In ``generate`` the prompt runs unpadded too, with ``"hf_attn_patch"`` or flash attention, and the cache gets its
    padded layout; what follows runs as it is, as do calls without an ``attention_mask`` or without padding, and those
    of an encoder without a token-wise head when padded on the left: the first state, which is pooled, is padding there.
    Outside ``generate`` a call fills a cache only if it says ``use_cache=True``.

    Args:
        model: a transformers model, possibly wrapped (DDP, PEFT); wrap it in ``torch.compile`` after this.
        drop_padding_targets: leave out labels that only a padding token could predict (the first real token of a
            left-padded row) or that stand on padding, instead of raising.
        check: compare a padded forward of a few tokens with the unpadded one, once, now. This is how a family is
            refused that would not compute the same.

    Returns:
        a handle: ``with unpadded(model): ...``, or ``handle.undo()`` when done.

    Raises:
        TypeError: if there is no transformers model in ``model``, or it is no decoder-only model or text encoder.
        ValueError: now, if the check fails; at a call, for a mask that is not ``[B, S]`` or has gaps inside a row,
            targets on padding, arguments that are not known to be per token, ``output_attentions``,
            ``logits_to_keep`` over 1.

    >>> import torch
    >>> from hf_attn_patch import unpadded
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    ...                                      num_attention_heads=2)).eval()
    >>> ids, mask = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    >>> padded = model(input_ids=ids, attention_mask=mask).logits
    >>> with unpadded(model):
    ...     packed = model(input_ids=ids, attention_mask=mask).logits
    >>> torch.allclose(padded[mask.bool()], packed[mask.bool()], atol=1e-5)
    True
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        raise TypeError(f"{type(model).__name__} holds no transformers model")
    if inner.config.is_encoder_decoder:
        raise TypeError(f"unpadded() serves decoder-only models and encoders, and {type(inner).__name__} is neither")
    handle = Unpadded(inner, drop_padding_targets)
    if not handle.arguments.rest or "attention_mask" not in handle.arguments.names:
        handle.undo()
        raise TypeError(
            f"{type(handle.target).__name__}.forward takes no attention_mask, or passes nothing on to attention"
        )
    if check:
        try:
            calibrate(handle)
        except BaseException:
            handle.undo()
            raise
    return handle
