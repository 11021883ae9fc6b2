"""The rows of families that get their KV heads from ``hf_attn_patch.modeling``: stock in, grouped out.

A grouped checkpoint has the stock names and layouts, so each row serves both, and a grouped one can be merged further.
Rows are read by ``table.py``, which is the door to them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_attn_patch.hf.auto_classes import PREFIX

from .family import Family, Projection, Stack
from .kv_field import KVField


def _separate(q: str, k: str, v: str) -> tuple[Projection, ...]:
    return (Projection(q, "q"), Projection(k, "k"), Projection(v, "v"))


def _grouped(stock: str, *stacks: Stack, prefixes: tuple[str, ...], **more: Any) -> Family:
    return Family((stock, PREFIX + stock), stacks, prefixes, becomes=PREFIX + stock, **more)


@dataclass(frozen=True, slots=True)
class PartField(KVField):
    """The KV heads of a part that becomes a model of this package (a tower of CLIP)."""

    becomes: str = "gqa_clip_text_model"

    def write(self, raw: dict[str, Any], config: Any, heads: int, kv_heads: Mapping[int, int]) -> None:
        # the whole config: older checkpoints leave out what is as the defaults have it
        raw |= json.loads(json.dumps(config.to_dict()))
        raw |= {self.name: self._number(list(kv_heads.values())), "model_type": self.becomes}


_DECODER = Stack(head_dim=None, rope="none", output="out_proj")
#: attentions that know their layer, so that each may have its own number of KV heads
_LAYERED = replace(_DECODER, kv_field=KVField(varies="list"))

_GPT2 = replace(
    _LAYERED,
    layer="h.{i}.attn.",
    projections=(Projection("c_attn", "qkv", transposed=True),),
    output="c_proj",
    output_transposed=True,
)
_GPT2_CROSS = replace(
    _GPT2,
    name="cross",
    layer="h.{i}.crossattention.",
    projections=(Projection("q_attn", "q", transposed=True), Projection("c_attn", "kv", transposed=True)),
    kv_field=KVField("cross_kv_heads"),
    cross=True,
    causal=False,
    optional=True,
)

_BERT = replace(
    _DECODER,
    layer="encoder.layer.{i}.attention.",
    projections=_separate("self.query", "self.key", "self.value"),
    output="output.dense",
    others=("output.LayerNorm",),  # behind the output
    causal=False,
)
_BERT_CROSS = replace(
    _BERT,
    name="cross",
    layer="encoder.layer.{i}.crossattention.",
    kv_field=KVField("cross_kv_heads"),
    cross=True,
    optional=True,
)

_T5_ENCODER = replace(
    _DECODER,
    name="encoder",
    layer="encoder.block.{i}.layer.0.SelfAttention.",
    projections=_separate("q", "k", "v"),
    output="o",
    kv_field=KVField("encoder_kv_heads"),
    num_layers="num_layers",
    head_dim="d_kv",
    others=("relative_attention_bias",),
    fixed_heads=True,  # the relative position bias has one number for each head
    causal=False,
    cached=False,
    optional=True,
)
_T5_DECODER = replace(
    _T5_ENCODER,
    name="decoder",
    layer="decoder.block.{i}.layer.0.SelfAttention.",
    kv_field=KVField("decoder_kv_heads"),
    num_layers="num_decoder_layers",
    causal=True,
    cached=True,
)
_T5_CROSS = replace(
    _T5_DECODER,
    name="cross",
    layer="decoder.block.{i}.layer.1.EncDecAttention.",
    kv_field=KVField("cross_kv_heads"),
    fixed_heads=False,
    cross=True,
    causal=False,
)

_BART_DECODER = replace(
    _DECODER,
    name="decoder",
    layer="decoder.layers.{i}.self_attn.",
    kv_field=KVField("decoder_kv_heads"),
    num_layers="decoder_layers",
    heads="decoder_attention_heads",
    width="d_model",
    optional=True,
)
_BART_CROSS = replace(
    _BART_DECODER,
    name="cross",
    layer="decoder.layers.{i}.encoder_attn.",
    kv_field=KVField("cross_kv_heads"),
    cross=True,
    causal=False,
)
_BART_ENCODER = replace(
    _BART_DECODER,
    name="encoder",
    layer="encoder.layers.{i}.self_attn.",
    kv_field=KVField("encoder_kv_heads"),
    num_layers="encoder_layers",
    heads="encoder_attention_heads",
    causal=False,
    cached=False,
)

_ALIBI = replace(_LAYERED, fixed_heads=True)
_CLIP = replace(_DECODER, layer="encoder.layers.{i}.self_attn.")


def _tower(name: str, causal: bool) -> Stack:
    return replace(
        _CLIP,
        name=name,
        layer=f"{name}_model.encoder.layers.{{i}}.self_attn.",
        part=f"{name}_config",
        kv_field=PartField(becomes=f"gqa_clip_{name}_model"),
        causal=causal,
        optional=True,
    )


ZOO = [
    _grouped("gpt2", _GPT2, _GPT2_CROSS, prefixes=("transformer.", "")),
    _grouped(
        "gpt_neox",
        replace(
            _LAYERED,
            layer="layers.{i}.attention.",
            projections=(Projection("query_key_value", "qkv", "groups"),),
            output="dense",
            rope="half",
            rotary_fraction=0.25,
        ),
        prefixes=("gpt_neox.", ""),
    ),
    _grouped("opt", replace(_LAYERED, layer="decoder.layers.{i}.self_attn."), prefixes=("model.", "")),
    _grouped("biogpt", replace(_LAYERED, layer="layers.{i}.self_attn."), prefixes=("biogpt.", "")),
    _grouped("bert", _BERT, _BERT_CROSS, prefixes=("bert.", "")),
    _grouped("roberta", _BERT, _BERT_CROSS, prefixes=("roberta.", "")),
    _grouped("electra", _BERT, _BERT_CROSS, prefixes=("electra.", "")),
    _grouped(
        "distilbert",
        replace(
            _BERT,
            layer="transformer.layer.{i}.attention.",
            projections=_separate("q_lin", "k_lin", "v_lin"),
            output="out_lin",
        ),
        prefixes=("distilbert.", ""),
    ),
    _grouped("t5", _T5_ENCODER, _T5_DECODER, _T5_CROSS, prefixes=("", "transformer.")),
    _grouped("mt5", _T5_ENCODER, _T5_DECODER, _T5_CROSS, prefixes=("", "transformer.")),
    _grouped("bart", _BART_DECODER, _BART_CROSS, _BART_ENCODER, prefixes=("model.", "")),
    _grouped("mbart", _BART_DECODER, _BART_CROSS, _BART_ENCODER, prefixes=("model.", "")),
    _grouped("marian", _BART_DECODER, _BART_CROSS, _BART_ENCODER, prefixes=("model.", "")),
    _grouped("whisper", _BART_DECODER, _BART_CROSS, _BART_ENCODER, prefixes=("model.", ""), reads="sound"),
    _grouped(
        "vit",
        replace(
            _BERT,
            projections=_separate("attention.query", "attention.key", "attention.value"),
        ),
        prefixes=("vit.", ""),
        reads="pictures",
    ),
    _grouped("clip", _tower("text", True), _tower("vision", False), prefixes=("",), reads="pictures and text"),
    _grouped("clip_text_model", _CLIP, prefixes=("text_model.", "")),
    _grouped("clip_vision_model", replace(_CLIP, causal=False), prefixes=("vision_model.", ""), reads="pictures"),
    _grouped(
        "bloom",
        replace(
            _ALIBI,
            layer="h.{i}.self_attention.",
            projections=(Projection("query_key_value", "qkv", "groups"),),
            output="dense",
        ),
        prefixes=("transformer.", ""),
    ),
    _grouped(
        "mpt",
        replace(_ALIBI, layer="blocks.{i}.attn.", projections=(Projection("Wqkv", "qkv"),)),
        prefixes=("transformer.", ""),
    ),
    _grouped(
        "gptj",
        replace(_LAYERED, layer="h.{i}.attn.", rope="interleaved", rotary_dim="rotary_dim"),
        prefixes=("transformer.", ""),
    ),
    _grouped(
        "codegen",
        replace(
            _LAYERED,
            layer="h.{i}.attn.",
            projections=(Projection("qkv_proj", "qvk", blocks=4),),
            rope="interleaved",
            rotary_dim="rotary_dim",
        ),
        prefixes=("transformer.", ""),
    ),
    _grouped("gpt_neo", replace(_DECODER, layer="h.{i}.attn.attention."), prefixes=("transformer.", "")),
    Family(
        ("gqa_falcon",),
        (
            Stack(
                layer="h.{i}.self_attention.",
                projections=(Projection("query_key_value", "qkv", "groups"),),
                output="dense",
                head_dim=None,
                no_rope_layers="alibi",
            ),
        ),
        ("transformer.", ""),
    ),
]
