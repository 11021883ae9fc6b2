"""How a model family that knows no KV grouping learns it: one mechanism for all of them.

A family file names three things, and nothing of the stock model is copied:

- a config: the stock one plus a number of KV heads (:class:`GroupedConfig`);
- its attention: the stock class with narrower K and V projections (:class:`GroupedAttention`). Stock modules take the
  number of heads from the width of what they project (``.view(B, S, -1, D)``), so their own forward serves. Only fused
  projections and layers that write the number of heads into a view split for themselves and call :func:`attend`;
- its models: the stock classes with those attentions put in when they are built (:class:`GroupedModel`).

With as many KV heads as query heads nothing is replaced: the same parameters under the same names, so a stock
checkpoint loads as it is and gives the same logits bit for bit.

This file stands on torch, transformers and ``KVGrouping`` alone: it travels inside checkpoints (``--with-code``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from hf_attn_patch.compat.model_classes import (
    InsideInterface,
    attention_name,
    initialise_again,
    map_checkpoint_names,
    set_attention_name,
)
from hf_attn_patch.errors import GroupingError
from hf_attn_patch.grouping import KVGrouping


class GroupedConfig:
    """Mixin of a config: numbers of KV heads, by default as many as there are query heads.

    ``kv_fields`` maps each field for KV heads to the field with the query heads that share them. The subclass declares
    the fields themselves (``int | None``, default None), because the stock configs are dataclasses.

    Experimental: in decoders whose attentions know their layer (``layer_idx``), ``num_key_value_heads`` may be a list
    with a number for each layer.

    Raises:
        GroupingError: query heads that cannot share so many KV heads evenly, or a list of another length.
    """

    kv_fields: ClassVar[dict[str, str]] = {"num_key_value_heads": "num_attention_heads"}

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        for field, heads in self.kv_fields.items():
            if getattr(self, field) is None:
                setattr(self, field, getattr(self, heads))
            given = getattr(self, field)
            if isinstance(given, (list, tuple)) and len(given) != self.num_hidden_layers:  # type: ignore[attr-defined]
                raise GroupingError(
                    f"{field} has {len(given)} numbers for {self.num_hidden_layers} layers"  # type: ignore[attr-defined]
                )
            for number in given if isinstance(given, (list, tuple)) else [given]:
                KVGrouping(getattr(self, heads), number)


class DecoderGroupedConfig(GroupedConfig):
    """Mixin of a config whose model may also be a decoder with cross-attention: its KV heads are counted apart."""

    kv_fields: ClassVar[dict[str, str]] = {
        "num_key_value_heads": "num_attention_heads",
        "cross_kv_heads": "num_attention_heads",
    }


class Seq2SeqGroupedConfig(GroupedConfig):
    """Mixin of an encoder-decoder config: KV heads of the encoder, of the decoder and of its cross-attention.

    The GQA paper (arXiv 2305.13245) converts the decoder's two and leaves the encoder as it is.
    """

    kv_fields: ClassVar[dict[str, str]] = {
        "encoder_kv_heads": "encoder_attention_heads",
        "decoder_kv_heads": "decoder_attention_heads",
        "cross_kv_heads": "decoder_attention_heads",
    }


class GroupedAttention:
    """Mixin of a stock attention class: fewer KV heads through the same forward.

    An instance starts as the stock module; :meth:`group` turns it into one of these.
    """

    #: the separate K and V projections; fused families override :meth:`narrow` instead
    kv_projections: ClassVar[tuple[str, ...]] = ("k_proj", "v_proj")
    #: the stock attribute that holds the number of query heads
    heads_attribute: ClassVar[str] = "num_heads"
    #: the family's own eager function, given K and V that are already repeated
    eager: Callable[..., tuple[Tensor, Tensor | None]]

    def kv_heads(self, config: Any) -> int:
        """HKV of this layer."""
        return of_layer(config.num_key_value_heads, self)

    def group(self, config: Any) -> None:
        """Narrow what projects K and V. ``config`` is the model's, for stock modules that keep none."""
        config = getattr(self, "config", config)
        groups = KVGrouping(getattr(self, self.heads_attribute), self.kv_heads(config))
        self.config = ConfigView(config)
        self.num_key_value_heads = groups.num_kv_heads
        self.num_key_value_groups = groups.group_size  # what transformers' own sdpa and flex functions read
        self.is_causal = getattr(self, "is_causal", True)
        self.narrow(groups)

    def narrow(self, groups: KVGrouping) -> None:
        """Give K and V the width of HKV heads."""
        for name in self.kv_projections:
            self.set_width(name, width(getattr(self, name)) // groups.group_size)

    def set_width(self, name: str, features: int) -> None:
        """Put a fresh layer with ``features`` outputs in the place of the one called ``name``, if its width differs."""
        setattr(self, name, with_width(getattr(self, name), features))


class Seq2SeqGroupedAttention(GroupedAttention):
    """For stock classes that serve the encoder, the decoder and the cross-attention alike."""

    def kv_heads(self, config: Any) -> int:
        if not self.is_decoder:  # type: ignore[attr-defined]
            return int(config.encoder_kv_heads)
        return int(config.decoder_kv_heads if self.is_causal else config.cross_kv_heads)


class GroupedModel:
    """Mixin of a stock model class: puts the grouped attentions in once the stock parts are built."""

    config_class: ClassVar[Any]
    #: stock class -> its grouped subclass, for every attention (and inner model) of the family
    replaced: ClassVar[dict[type, type]]

    def post_init(self) -> None:
        # every transformers model calls this last in __init__, on the meta device too; new layers are initialised by it
        for module in list(self.modules())[1:]:  # type: ignore[attr-defined]
            grouped = self.replaced.get(type(module))
            if grouped is None:
                continue
            module.__class__ = grouped
            if isinstance(module, GroupedAttention):
                module.group(self.config)  # type: ignore[attr-defined]
                initialise_again(module)
        super().post_init()  # type: ignore[misc]

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: the stock ``_init_weights`` runs here, and transformers need not guard against one that it does not know.

        (That guard passes over modules without parameters of their own, such as T5's attention and its K and V.)
        """
        return False


class GroupedModelOutsideInterface(InsideInterface, GroupedModel):
    """For families whose stock attention is not called through transformers' interface, but whose grouped one is."""

    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    #: whether the stock blocks hand on where continuous batching keeps each token
    continuous_batching: ClassVar[bool] = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # the stock parts look their attention class up by name and know only their own names
        wanted = self.get_correct_attn_implementation(attention_name(config), True)  # type: ignore[attr-defined]
        set_attention_name(config, "eager")
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        set_attention_name(config, wanted)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """``generate_batch`` begins here.

        Raises:
            ValueError: in families whose stock code loses the paged cache on its way, most of them without a word.
        """
        if not self.continuous_batching:
            raise ValueError(
                f"{type(self).__name__} cannot run under continuous batching with this transformers, whose code for "
                "the family does not hand paged caches to its layers: call generate instead of generate_batch"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]


def of_layer(kv_heads: int | list[int], attention: Any) -> int:
    """The number of KV heads of one attention, where a config has one for all layers or one for each."""
    return int(kv_heads[attention.layer_idx] if isinstance(kv_heads, (list, tuple)) else kv_heads)


def width(layer: Any) -> int:
    """Output features of a Linear or Conv1D."""
    features: int = layer.nf if isinstance(layer, Conv1D) else layer.out_features
    return features


def with_width(layer: Any, features: int) -> Any:
    """A fresh layer like ``layer`` with ``features`` outputs; ``layer`` itself if it has them already."""
    if features == width(layer):
        return layer
    if isinstance(layer, Conv1D):
        return Conv1D(features, layer.nx)
    return type(layer)(layer.in_features, features, bias=layer.bias is not None)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, H * D] -> [B, H, S, D]."""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)


def split_groups(qkv: Tensor, groups: KVGrouping, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """A fused projection whose rows are, per KV head, its G queries, its key, its value (Falcon's layout).

    With G = 1 that is the per-head [q, k, v] of GPT-NeoX and BLOOM, with one KV head the [q x H, k, v] of MQA.

    Args:
        qkv: [B, S, HKV * (G + 2) * D].

    Returns:
        q [B, HQ, S, D], k and v [B, HKV, S, D].
    """
    q, k, v = qkv.view(*qkv.shape[:-1], groups.num_kv_heads, -1, head_dim).split([groups.group_size, 1, 1], dim=-2)
    return q.flatten(2, 3).transpose(1, 2), k.squeeze(-2).transpose(1, 2), v.squeeze(-2).transpose(1, 2)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Call the attention that the model's config names.

    Args:
        query: [B, HQ, Sq, D].
        key: [B, HKV, Sk, D].
        value: [B, HKV, Sk, D].

    Returns:
        [B, Sq, HQ * D] and the weights [B, HQ, Sq, Sk], or None from an implementation that never has them.
    """
    function = ALL_ATTENTION_FUNCTIONS.get_interface(attention_name(module.config), grouped_eager)
    out, weights = function(module, query, key, value, mask, **kwargs)
    return out.flatten(2), weights


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """[B, HKV, S, D] -> [B, HKV * times, S, D], each head followed by its copies. Only eager attention needs it."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def grouped_eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The family's own eager attention, which wants as many KV heads as query heads."""
    times = query.shape[1] // key.shape[1]
    out, weights = module.eager(query, repeat_heads(key, times), repeat_heads(value, times), attention_mask, **kwargs)
    return out, weights


#: the name under which stock forwards find :func:`grouped_eager`
EAGER = "grouped_eager"
AttentionInterface.register(EAGER, grouped_eager)


class ConfigView:
    """The model's config as a stock attention module sees it: "eager" reads as :data:`EAGER`.

    A stock forward passes its own file's eager function to the interface, and that one cannot group. The name is the
    only door to put another in its place; the rest of the model goes on reading "eager" (masks, output_attentions).
    """

    _config: Any  # in __dict__, which torch.compile guards (2.11 fails without one)

    def __init__(self, config: Any) -> None:
        object.__setattr__(self, "_config", config)

    @property
    def _attn_implementation(self) -> str | None:
        name = attention_name(self._config)
        return EAGER if name == "eager" else name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def __reduce__(self) -> tuple[type, tuple[Any]]:  # copy and pickle
        return ConfigView, (self._config,)


def eager_with_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scores: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention spelled out, softmax in fp32, for families that have no eager function of their own.

    Args:
        scores: [B, HQ, Sq, Sk], where a family works them out its own way; then ``position_bias`` is in them.
    """
    if scores is None:
        scores = query @ key.transpose(-1, -2) * scaling
        if position_bias is not None:
            scores = scores + position_bias
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout)
    return (weights @ value).transpose(1, 2), weights


def share_checkpoint_names(*classes: type) -> None:
    """Let grouped classes read the older weight names that transformers maps for the stock class of the same name."""
    for cls in classes:
        map_checkpoint_names(cls, cls.__name__.removeprefix("Grouped"))
