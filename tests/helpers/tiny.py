"""Tiny models, a tiny tokenizer and a little real text, made on the spot."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from typing import Any

import torch


@functools.lru_cache(maxsize=1)
def python_sources(limit: int = 40) -> tuple[Path, ...]:
    """Some files of Python's own library, in a fixed order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return tuple(sorted(p for p in folder.glob("*.py") if 2_000 < p.stat().st_size < 40_000)[:limit])


@functools.lru_cache(maxsize=1)
def trained_tokenizer(vocab_size: int = 512) -> Any:
    """A byte-level BPE of 512 words trained on Python's own library."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train([str(p) for p in python_sources()], vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>")


def tiny_llama(kv_heads: int = 4, seed: int = 0, **changes: Any) -> Any:
    """A Llama of two layers and four heads, width 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    defaults = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": kv_heads, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **changes}))


def save_tiny(folder: Path, model: Any) -> str:
    """The model and the tokenizer as a checkpoint."""
    model.save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return str(folder)
