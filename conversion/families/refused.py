"""Families whose config has a field for KV heads that cannot be given another number, and why: data."""

from __future__ import annotations

_LATENT = (
    "it caches one latent for each token (MLA) and makes all keys and values from that: there are no KV heads to "
    "merge, and its num_key_value_heads must stay the number of query heads"
)
_CONVOLVED = (
    "a convolution mixes its keys and values from one token to the next, channel by channel, between their projections "
    "and attention: it cannot be given other heads"
)

_NO_FIELD = (
    "its config has no field for KV heads, and this package has no grouped model of it (of models that hear it has "
    "Whisper's)"
)
_SOUND = (
    "its config has no field for KV heads, and this package has no grouped model of it (of models that make sound, "
    "CSM, Higgs Audio and Moshi can be converted)"
)
_ONE_FIELD = (
    "one field of its config is for its decoder's own attention and its cross-attention, which no row describes yet "
    "(of those that hear, Whisper can be converted)"
)
_INSIDE = (
    "its decoder's numbers of heads stand in a config inside its own, which no row describes yet (of those that hear, "
    "Whisper can be converted)"
)

#: reason -> model types
REFUSED: dict[str, tuple[str, ...]] = {
    _LATENT: (
        "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text",
        "glm4_moe_lite", "glm5_next_text", "glm_moe_dsa", "hy_v4", "hy_v4_vl_text", "kimi_linear", "longcat_flash",
        "minicpm3", "mistral4", "mistral_large4_text", "sarvam_mla", "youtu",
    ),
    _CONVOLVED: ("inkling_text", "inkling2_text", "inkling2_loop_text", "zaya"),
    "its layers have one key for all query heads already, which is the value too": ("deepseek_v4",),
    "each KV head chooses by its values, all heads' together, which keys it sees: merged heads would choose others": (
        "doge",
    ),
    "its query heads are as many as its KV heads times its experts: another number of one changes the other": (
        "jetmoe",
    ),
    "its sparse layers have an indexer head for each KV head, which chooses the blocks that head sees": (
        "minimax_m3_vl_text",
    ),
    _NO_FIELD: ("pop2piano", "seamless_m4t", "seamless_m4t_v2", "speech_to_text", "speecht5"),
    _SOUND: ("musicgen_decoder", "musicgen_melody_decoder"),
    _ONE_FIELD: ("cohere_asr", "moonshine", "moonshine_streaming"),
    _INSIDE: ("canary", "dia"),
    "its heads each have a norm of their own with gains and biases, on queries and keys": ("chameleon",),
}  # fmt: skip


def why_refused(model_type: str) -> str | None:
    """Why a family cannot be converted, if that is known."""
    for reason, names in REFUSED.items():
        if model_type in names:
            return reason
    return None
