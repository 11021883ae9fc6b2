"""How long a sequence a model can read, and what a decoder's begins with."""

from __future__ import annotations

from typing import Any

#: families whose learned positions begin behind the padding token's: RoBERTa and what is made after it
BEHIND_PADDING = frozenset({
    "altclip_text_model", "bridgetower_text_model", "camembert", "clap_text_model", "data2vec-text", "esm", "ibert",
    "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
})  # fmt: skip


def positions_of(config: Any) -> int | None:
    """The most tokens of a sequence; None where a config names no bound.

    Args:
        config: of a language model, or of one that has such a part.

    >>> import transformers
    >>> positions_of(transformers.BertConfig()), positions_of(transformers.RobertaConfig(max_position_embeddings=514))
    (512, 512)
    >>> positions_of(transformers.WhisperConfig())  # its decoder
    448
    """
    text = config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None)  # Whisper
    if not most or most < 0:
        return None
    family = str(text.model_type).removeprefix("gqa_")
    if family not in BEHIND_PADDING or getattr(text, "position_embedding_type", None) not in (None, "absolute"):
        return int(most)  # ESM also has rotary positions
    padding = 1 if family == "mpnet" else int(text.pad_token_id or 0)
    return int(most) - padding - 1


def start_of(config: Any) -> int | None:
    """The token that a decoder's words begin with, as ``generate`` finds it: where none is named, the decoder's first.

    >>> from transformers import BartConfig, T5Config, T5GemmaConfig
    >>> start_of(BartConfig(decoder_start_token_id=7)), start_of(T5GemmaConfig()), start_of(T5Config())
    (7, 2, None)
    """
    given = getattr(config, "decoder_start_token_id", None)
    return getattr(config.get_text_config(decoder=True), "bos_token_id", None) if given is None else given
