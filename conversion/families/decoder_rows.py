"""Rows of decoders that stock transformers runs with any number of KV heads: what is unlike the rows of ``table.py``.

Hybrids (state spaces, linear attention or convolutions in the other layers) are described by their attention layers.
Rows are read by ``table.py``, which is the door to them; names that an older transformers lacks do no harm.
"""

from __future__ import annotations

from dataclasses import replace

from .family import Family, Norm, Projection, Stack
from .kv_field import EvenField, KVField, NestedField

_NORMED = Stack(shared_qk_norm=True)
#: a gate for each dimension of what attention gives, made from what the layer reads
_GATED = replace(_NORMED, values_fixed=True, others=("gate_proj",))
#: the gate comes out of the query projection: for each head its query, then its gate
_GATE_IN_Q = replace(
    _NORMED,
    projections=(Projection("q_proj", "qg", "heads"), Projection("k_proj", "k"), Projection("v_proj", "v")),
    values_fixed=True,
    sparse=True,
)
_HYBRID = Stack(sparse=True)
_OUT_PROJ = replace(_NORMED, output="out_proj", sparse=True)
#: norms without gains on queries and keys
_BARE_NORMS = Stack(keys_fixed=True)
_FLAT_NORMS = (Norm("q_norm", "q", "flat"), Norm("k_norm", "k", "flat"))
#: Gemma 3n, 4: norms on queries, keys and values; the last layers read the keys and values of an earlier one
_GEMMA = replace(
    _NORMED,
    projections=(Projection("q_proj", "q"), Projection("k_proj", "k"), Projection("v_proj", "v", optional=True)),
    keys_fixed=True,
    values_fixed=True,
    sparse=True,
)
_GEMMA4 = replace(_GEMMA, kv_field=KVField(varies="types"))
#: the projections are modules with a linear layer inside
_INNER_LINEAR = Stack(
    projections=(Projection("q_proj.linear", "q"), Projection("k_proj.linear", "k"), Projection("v_proj.linear", "v")),
    output="o_proj.linear",
)
#: one block that several layers run; it is stored with the first of them
_SHARED_BLOCK = Stack(
    layer="layers.{i}.shared_transf.self_attn.",
    head_dim="attention_head_dim",
    q_width="attention_hidden_size",
    kv_width="attention_hidden_size",
    sparse=True,
)

#: Diffusers' names, of a language model whose layers stand at the top (Cosmos 3)
DIFFUSERS = Stack(
    projections=(Projection("to_q", "q"), Projection("to_k", "k"), Projection("to_v", "v")), output="to_out"
)
_MOLMO = Stack(
    projections=(Projection("att_proj", "qkv"),),
    output="attn_out",
    norms=(Norm("q_norm", "q", "flat", or_shared=True), Norm("k_norm", "k", "flat", or_shared=True)),
)

_ENCODER = Stack(
    name="encoder", layer="encoder.layers.{i}.self_attn.", part="encoder", causal=False, cached=False, optional=True
)
_DECODER = Stack(name="decoder", layer="decoder.layers.{i}.self_attn.", part="decoder", optional=True)
#: the decoder's cross-attention has the decoder's numbers
_CROSS = replace(
    _DECODER,
    name="cross",
    layer="decoder.layers.{i}.cross_attn.",
    rope="none",
    cross=True,
    causal=False,
    kv_width="cross_attention_hidden_size",
)
#: one attention of the decoder reads its own tokens, which rotate, and the encoder's, which do not
_INSIDE = "encoder.text_model.layers.{i}.self_attn."
_T5GEMMA2 = (
    replace(_ENCODER, called=_INSIDE, part="encoder.text_config", shared_qk_norm=True),
    replace(_DECODER, shared_qk_norm=True),
)

DECODERS = [
    Family((
        "cohere_compass_text", "deepseek_ocr2_text", "emu3_text_model", "evolla", "falcon_h1",
        "glm4v_moe_text", "glm_image_text", "granite4_vision_text", "granite_docling_text", "internlm3",
        "iquestcoder", "paddleocr_vl_text", "qwen2_5_omni_text",
        "unlimited_ocr_text", "voxtral_realtime_text", "gradium_phonon_tts", "higgs_audio_v2",
    )),
    Family(("cosmos3_edge_text",), other=(Family((), (DIFFUSERS,), ("",)),)),
    Family(("bamba", "granitemoehybrid", "minimax"), (_HYBRID,)),
    Family(("jamba",), (replace(_HYBRID, rope="none"),)),
    Family(("nemotron_h",), (replace(_HYBRID, layer="layers.{i}.mixer.", rope="none"),), ("backbone.", "model.", "")),
    Family(("recurrent_gemma",), (replace(_HYBRID, layer="layers.{i}.temporal_block.", rotary_fraction=0.5),)),
    Family((
        "apertus1p5_text", "dots1", "glm4_moe", "hunyuan_v1_moe", "hunyuan_vl_text",
        "hy_v3", "kolibri1", "mellum", "qwen3_omni_moe_text", "qwen3_vl_moe_text",
    ), (_NORMED,)),
    Family(("lara_mini",), (replace(_NORMED, sparse=True),)),
    Family(("lfm2", "lfm2_moe"), (_OUT_PROJ,)),
    # lfm3's gate and laguna's are numbers for each head, which change no basis; laguna's may be for each dimension
    Family(("lfm3",), (replace(_NORMED, sparse=True, others=("gate_proj", "g_proj"), ordered_heads=True),)),
    Family(
        ("laguna",),
        (
            replace(
                _NORMED, heads="num_attention_heads_per_layer", values_fixed=True, others=("g_proj",),
                ordered_heads=True,
            ),
        ),
    ),
    Family(
        ("step3p5",),
        (replace(_NORMED, kv_field=KVField(varies="layers"), others=("g_proj",), ordered_heads=True),),
    ),
    Family(("flint",), (replace(_NORMED, others=("softmax_offset", "sinks"), ordered_heads=True),)),
    Family(("nanochat",), (_BARE_NORMS,)),
    Family(("llama4_text",), (replace(_BARE_NORMS, keys_fixed="use_qk_norm", rope="interleaved"),)),
    Family(("cohere2_moe", "ernie4_5_vl_moe_text", "glm4v_text", "glm_ocr_text"), (Stack(rope="interleaved"),)),
    Family(("olmo_hybrid",), (Stack(norms=_FLAT_NORMS, sparse=True),)),
    Family(("afmoe",), (_GATED,)),
    Family(("beam",), (replace(_GATED, others=("gate_proj", "gate_bias"), ordered_heads=True),)),
    Family(("muse_glimmer_text", "muse_spark_text"), (replace(_GATED, keys_fixed=True, ordered_heads=True),)),
    Family(
        ("dory",),
        (replace(_GATED, keys_fixed=True, others=("g_proj", "gate_proj", "sqk", "s_gate"), ordered_heads=True),),
        prefixes=("backbone.", "model.", ""),
    ),
    Family(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), (_GATE_IN_Q,)),
    Family(("qwen4_exp_text",), (replace(_GATE_IN_Q, others=("indexer",)),)),
    Family(("bitnet",), (Stack(values_fixed=True, others=("attn_sub_norm",), ordered_heads=True),)),
    Family(
        ("diffllama",),
        (
            Stack(
                kv_field=EvenField(),
                values_fixed=True,
                others=("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "groupnorm"),
                fixed_heads=True,
            ),
        ),
    ),
    # sinks that a published checkpoint calls otherwise than the model: they stay where they are
    Family(
        ("mimo_v2_flash",),
        (
            Stack(
                kv_field=KVField(twice="sliding_attention"), value_dim="v_head_dim",
                others=("attention_sink_bias", "sinks"), ordered_heads=True,
            ),
        ),
    ),
    Family(
        ("dbrx",),
        (
            Stack(
                layer="blocks.{i}.norm_attn_norm.attn.",
                projections=(Projection("Wqkv", "qkv"),),
                output="out_proj",
                kv_field=NestedField("kv_n_heads"),
                head_dim=None,
            ),
        ),
        prefixes=("transformer.", ""),
    ),
    Family(("gemma3n_text",), (_GEMMA,)),
    Family(("gemma4_text", "gemma4_unified_text", "diffusion_gemma_text"), (_GEMMA4,)),
    Family(("phi4_multimodal",), (Stack(projections=(Projection("qkv_proj", "qkv"),)),)),
    Family(
        ("molmo2_text",),
        (_MOLMO,),
        other=(
            Family((), (replace(_MOLMO, layer="blocks.{i}.self_attn."),), ("model.transformer.", "transformer.")),
            Family((), (Stack(norms=_MOLMO.norms),)),
        ),
    ),
    Family(("t5gemma",), (_ENCODER, _DECODER, _CROSS)),
    Family(("t5gemma2",), _T5GEMMA2, other=(Family((), (replace(_T5GEMMA2[0], layer=_INSIDE), _T5GEMMA2[1])),)),
    Family(("t5gemma2_text",), (Stack(causal=False, shared_qk_norm=True),)),
    # a small decoder makes the other codes of each frame: what it caches is gone with the frame
    Family(
        ("csm",),
        (
            Stack(layer="backbone_model.layers.{i}.self_attn."),
            Stack(
                name="depth", layer="depth_decoder.model.layers.{i}.self_attn.", part="depth_decoder_config",
                cached=False, optional=True,
            ),
        ),
        prefixes=("",),
        reads="text and codes of sound",
    ),
    Family(("moshi", "kyutai_speech_to_text"), (_INNER_LINEAR,), ("decoder.model.", "model.", "")),
    Family(
        ("exaone",),
        (Stack(layer="h.{i}.attn.attention.", output="out_proj"),),
        prefixes=("transformer.", ""),
        other=(Family(()),),
    ),
    Family(
        ("sarvam_moe",),
        (
            replace(
                _NORMED, layer="layers.{i}.attention.", projections=(Projection("query_key_value", "qkv"),),
                output="dense",
            ),
        ),
    ),
    Family(
        ("mllama_text_model",),
        (
            replace(_HYBRID, head_dim=None),
            replace(
                _NORMED, name="cross", layer="layers.{i}.cross_attn.", head_dim=None, rope="none", cross=True,
                causal=False, sparse=True, optional=True,
            ),
        ),
    ),
    Family(("zamba",), (_SHARED_BLOCK,)),
    Family(("zamba2",), (replace(_SHARED_BLOCK, layer="layers.{i}.shared_transformer.self_attn."),)),
]  # fmt: skip
