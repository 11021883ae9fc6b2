"""Tiny, randomly initialised models of many transformers families, and inputs for each.

Every family is data: the names of its config and model class, the config's options, and which kind of inputs it takes
(``family_inputs.py``). Sizes are chosen to be unlike one another (HQ 4, HKV 2, D 16, E 64, two layers), windows and
chunks to be shorter than the sequences of the tests, so that a dropped argument changes the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

VOCAB, PAD = 101, 0
#: Token ids that no family below treats specially lie in [FIRST_TOKEN, VOCAB).
FIRST_TOKEN = 10


@dataclass(frozen=True)
class Family:
    """One family: ``model(config(**options))``, inputs of ``kind``; ``calls`` attention modules run in a forward."""

    name: str
    kind: str
    config: str
    model: str
    options: Mapping[str, Any]
    calls: int
    #: what is special about it, as tests ask for it. "2d-only": its own code reads the 2-D mask. "keeps-position-ids",
    #: "keeps-kwargs": its layers don't hand these on, so no attention function gets to see them.
    traits: frozenset[str] = field(default_factory=frozenset)

    @property
    def available(self) -> bool:
        return hasattr(transformers, self.config) and hasattr(transformers, self.model)

    @property
    def generates(self) -> bool:
        return self.kind in ("decoder", "encoder-decoder") and "no-generate" not in self.traits


_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
}
_IMAGE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "dropout_rate": 0.0,
    "pad_token_id": PAD,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_WAV = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2}
_LOCAL: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
_VLM_TEXT = {**_DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
_VLM_IDS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}


def _family(kind: str, name: str, config: str, model: str, calls: int, traits: str, options: dict[str, Any]) -> Family:
    return Family(name, kind, config, model, options, calls, frozenset(traits.split()))


def _decoder(name: str, stem: str, traits: str = "", *, model: str | None = None, **options: Any) -> Family:
    """A decoder-only family whose config knows the usual names."""
    merged = {**_DECODER, **options}
    calls = merged.get("num_hidden_layers", merged.get("n_layer", 2))
    return _family("decoder", name, f"{stem}Config", model or f"{stem}ForCausalLM", calls, traits, merged)


def _encoder(name: str, stem: str, traits: str = "", **options: Any) -> Family:
    merged = {**_ENCODER, **options}
    calls = 1 if "shared-layers" in traits else 2
    return _family("encoder", name, f"{stem}Config", f"{stem}Model", calls, traits, merged)


def _seq2seq(name: str, stem: str, traits: str = "", *, base: dict[str, Any] = _SEQ2SEQ, **options: Any) -> Family:
    model = f"{stem}ForConditionalGeneration" if stem != "Marian" else "MarianMTModel"
    return _family("encoder-decoder", name, f"{stem}Config", model, 6, traits, {**base, **options})


_FAMILIES = (
    # ---- decoder-only
    _decoder("llama-mha", "Llama", "core", num_key_value_heads=4),
    _decoder("llama", "Llama", "core"),
    _decoder("llama-mqa", "Llama", num_key_value_heads=1),
    _decoder("llama-3-of-12", "Llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=3),
    _decoder("mistral", "Mistral", "window", sliding_window=5),
    _decoder("mixtral", "Mixtral", "moe", num_local_experts=4, **_MOE),
    _decoder("ministral", "Ministral", "window", head_dim=16, **_LOCAL),
    _decoder("qwen2", "Qwen2", "core window", use_sliding_window=True, max_window_layers=1, sliding_window=5),
    _decoder("qwen2_moe", "Qwen2Moe", "moe", num_experts=4, moe_intermediate_size=32, **_MOE),
    _decoder("qwen3", "Qwen3", head_dim=16),
    _decoder("qwen3_moe", "Qwen3Moe", "moe", head_dim=16, num_experts=4, moe_intermediate_size=32, **_MOE),
    _decoder("gemma", "Gemma", head_dim=24),
    _decoder("gemma2", "Gemma2", "window softcap core", head_dim=16, query_pre_attn_scalar=24,
             attn_logit_softcapping=1.5, **_LOCAL),
    _decoder("gemma3_text", "Gemma3Text", "window", model="Gemma3ForCausalLM", head_dim=16,
             query_pre_attn_scalar=24, **_LOCAL),
    _decoder("phi", "Phi", partial_rotary_factor=0.5, resid_pdrop=0.0, embd_pdrop=0.0),
    _decoder("phi3", "Phi3", "window", sliding_window=5, resid_pdrop=0.0),
    _decoder("olmo", "Olmo", clip_qkv=2.0),
    _decoder("olmo2", "Olmo2"),
    _decoder("olmo3", "Olmo3", "window", **_LOCAL),
    _decoder("olmoe", "Olmoe", "moe", num_experts=4, **_MOE),
    _decoder("granite", "Granite", attention_multiplier=0.17),
    _decoder("starcoder2", "Starcoder2", "window", sliding_window=5, residual_dropout=0.0, embedding_dropout=0.0),
    _decoder("stablelm", "StableLm", "keeps-kwargs", qk_layernorm=True, use_qkv_bias=True),
    _decoder("cohere", "Cohere", use_qk_norm=True),
    _decoder("cohere2", "Cohere2", "window", **_LOCAL),
    _decoder("smollm3", "SmolLM3", no_rope_layers=[1, 0]),
    _decoder("glm", "Glm", head_dim=16),
    _decoder("glm4", "Glm4", head_dim=16),
    _decoder("nemotron", "Nemotron", "keeps-kwargs"),
    _decoder("exaone4", "Exaone4", "window", **_LOCAL),
    _decoder("ernie4_5", "Ernie4_5"),
    _decoder("helium", "Helium", head_dim=16),
    _decoder("apertus", "Apertus"),
    _decoder("diffllama", "DiffLlama"),
    _decoder("gpt_oss", "GptOss", "window sink moe core", head_dim=16, num_local_experts=4, **_MOE, **_LOCAL),
    _decoder("llama4_text", "Llama4Text", "chunk moe keeps-position-ids", model="Llama4ForCausalLM", head_dim=16,
             num_local_experts=2,
             intermediate_size_mlp=96, attention_chunk_size=6,
             layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0]),
    _decoder("deepseek_v3", "DeepseekV3", "dv moe", num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16,
             qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, n_routed_experts=4, n_group=2, topk_group=1,
             moe_intermediate_size=32, first_k_dense_replace=1, num_mtp_layers=0, **_MOE),
    _decoder("opt", "OPT", "2d-only", ffn_dim=96, dropout=0.0, word_embed_proj_dim=64),
    _decoder("biogpt", "BioGpt", "learned-positions", hidden_dropout_prob=0.0),
    _decoder("gpt_neox", "GPTNeoX", "core", rotary_pct=0.25),
    _family("decoder", "gpt2", "GPT2Config", "GPT2LMHeadModel", 2, "core",
            {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0,
                 "embd_pdrop": 0.0,
                 "attn_pdrop": 0.0, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}),
    _family("decoder", "gpt_bigcode", "GPTBigCodeConfig", "GPTBigCodeForCausalLM", 2, "keeps-position-ids",
            {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "multi_query": True,
                 "resid_pdrop": 0.0,
                 "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}),
    _decoder("modernbert_decoder", "ModernBertDecoder", "window", local_attention=6,
             layer_types=["sliding_attention", "full_attention"]),
    # ---- encoders
    _encoder("bert", "Bert", "core", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    _encoder("roberta", "Roberta", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    _encoder("electra", "Electra", embedding_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    _encoder("albert", "Albert", "shared-layers", embedding_size=32),
    _encoder("distilbert", "DistilBert", dim=64, hidden_dim=96, n_layers=2, n_heads=4, dropout=0.0,
             attention_dropout=0.0),
    _encoder("modernbert", "ModernBert", "window", local_attention=6,
             layer_types=["sliding_attention", "full_attention"], cls_token_id=1, sep_token_id=2, bos_token_id=1,
             eos_token_id=2),
    _encoder("eurobert", "EuroBert", num_key_value_heads=2, bos_token_id=1, eos_token_id=2),
    _encoder("nomic_bert", "NomicBert"),
    _encoder("splinter", "Splinter", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    _encoder("esm", "Esm", "2d-only", position_embedding_type="rotary", mask_token_id=3, hidden_dropout_prob=0.0,
             attention_probs_dropout_prob=0.0, token_dropout=False),
    # ---- encoder-decoder
    _seq2seq("bart", "Bart", "core"),
    _seq2seq("mbart", "MBart"),
    _seq2seq("marian", "Marian"),
    _seq2seq("pegasus", "Pegasus"),
    _seq2seq("blenderbot", "Blenderbot"),
    _seq2seq("m2m_100", "M2M100"),
    _seq2seq("t5", "T5", "bias core", base=_T5),
    _seq2seq("mt5", "MT5", "bias", base=_T5),
    _seq2seq("umt5", "UMT5", "bias", base=_T5),
    _seq2seq("switch", "SwitchTransformers", "bias moe", base=_T5, num_experts=2, num_sparse_encoder_layers=1,
             num_sparse_decoder_layers=1),
    _seq2seq("t5gemma", "T5Gemma", "window softcap", base={}, vocab_size=VOCAB, decoder_start_token_id=1,
             **{side: dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=24,
                           attn_logit_softcapping=1.5, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, **_LOCAL)
                for side in ("encoder", "decoder")}),
    # ---- vision
    _family("vision", "vit", "ViTConfig", "ViTModel", 2, "core", _IMAGE),
    _family("vision", "deit", "DeiTConfig", "DeiTModel", 2, "", _IMAGE),
    _family("vision", "dinov2", "Dinov2Config", "Dinov2Model", 2, "", _IMAGE),
    _family("vision", "siglip_vision", "SiglipVisionConfig", "SiglipVisionModel", 2, "", _IMAGE),
    _family("vision", "beit", "BeitConfig", "BeitModel", 2, "bias", {**_IMAGE, "use_relative_position_bias": True}),
    # ---- text and vision
    _family("text-vision", "clip", "CLIPConfig", "CLIPModel", 4, "",
            {"projection_dim": 32, "text_config": dict(_ENCODER, bos_token_id=1, eos_token_id=2),
                 "vision_config": _IMAGE}),
    _family("text-vision", "siglip", "SiglipConfig", "SiglipModel", 4, "",
            {"text_config": _ENCODER, "vision_config": _IMAGE}),
    _family("image-chat", "llava", "LlavaConfig", "LlavaForConditionalGeneration", 4, "",
            {"text_config": dict(model_type="llama", **_DECODER), "image_token_index": 5, "vision_feature_layer": -1,
                 "vision_config": dict(model_type="clip_vision_model", projection_dim=32, **_IMAGE)}),
    _family("image-chat", "gemma3", "Gemma3Config", "Gemma3ForConditionalGeneration", 4, "window overlay",
            {"text_config": dict(_DECODER, head_dim=16, query_pre_attn_scalar=24, **_LOCAL), "image_token_index": 5,
                 "image_token_id": 5, "mm_tokens_per_image": 16, "vision_config": _IMAGE}),
    _family("patches-chat", "qwen2_vl", "Qwen2VLConfig", "Qwen2VLForConditionalGeneration", 4, "cu_seqlens",
            dict(text_config=_VLM_TEXT, **_VLM_IDS,
                 vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 4,
                      "patch_size": 4})),
    _family("patches-chat", "qwen2_5_vl", "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", 4, "cu_seqlens",
            dict(text_config=_VLM_TEXT, **_VLM_IDS,
                 vision_config={"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "patch_size": 4,
                                    "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [1]})),
    # ---- speech
    _family("speech", "wav2vec2", "Wav2Vec2Config", "Wav2Vec2Model", 2, "core", _WAV),
    _family("speech", "hubert", "HubertConfig", "HubertModel", 2, "", _WAV),
    _family("features", "wav2vec2_bert", "Wav2Vec2BertConfig", "Wav2Vec2BertModel", 2, "bias",
            {**_WAV, "feature_projection_input_dim": 24, "position_embeddings_type": "relative_key",
             "left_max_position_embeddings": 6, "right_max_position_embeddings": 3, "conv_depthwise_kernel_size": 3,
             "conformer_conv_dropout": 0.0}),
    _family("speech-to-text", "whisper", "WhisperConfig", "WhisperForConditionalGeneration", 6, "core",
            {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64,
             "begin_suppress_tokens": None, "suppress_tokens": None}),
)  # fmt: skip

FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES if family.available}


def families(*kinds: str, trait: str | None = None) -> list[str]:
    """The names of the families of these kinds (all without any) that have the trait: ids for parametrize."""
    return [
        name
        for name, family in FAMILIES.items()
        if (not kinds or family.kind in kinds) and (trait is None or trait in family.traits)
    ]
