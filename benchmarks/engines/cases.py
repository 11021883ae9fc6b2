"""Tiny multi-head models, their conversion to few KV heads, and what transformers says of it: what engines must say.

Weights are drawn large enough for one token to stand out, and rounded to fp16, so that an f16 file holds the same
numbers. Of many prompts those are asked whose every greedy step has the widest margin; what the same checkpoint says
with its KV heads exchanged is kept beside, since an engine that paired heads wrongly must be seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from hf_attn_patch.conversion import convert

HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB = 8, 2, 32, 256, 512
NEW_TOKENS, TOP, PROMPTS, CANDIDATES, LENGTH = 12, 5, 3, 256, 9
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
_GEMMA = {"head_dim": HEAD_DIM, "hidden_size": 128, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}

#: families whose stock class has a field for KV heads -> what their config has beside the common fields
STOCK: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": HEAD_DIM, "hidden_size": 128},  # heads wider than hidden_size / heads
    "mistral": {"sliding_window": None, "head_dim": HEAD_DIM},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": HEAD_DIM, "hidden_size": 128},
    "mixtral": {"num_local_experts": 4, "head_dim": HEAD_DIM},
    "gemma": {k: v for k, v in _GEMMA.items() if k != "query_pre_attn_scalar"},
    "gemma2": _GEMMA | {"sliding_window": 8},
    "gemma3_text": _GEMMA | {"sliding_window": 8},  # every sixth layer is full: these two are not
    # all experts: of which two are nearly as good, Q8_0's rounding of activations would choose
    "qwen2_moe": _MOE | {"num_experts_per_tok": 4, "shared_expert_intermediate_size": 64, "norm_topk_prob": False},
    "qwen3_moe": _MOE | {"head_dim": HEAD_DIM},
    "phi3": {},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.15},
    "glm4": {"head_dim": HEAD_DIM},
    "starcoder2": {"use_bias": True},
    "cohere": {"use_qk_norm": False, "tie_word_embeddings": True, "logit_scale": 0.75},
    "stablelm": {"use_qkv_bias": True},
    "smollm3": {"num_hidden_layers": 4},  # the fourth layer is without RoPE
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
}

_GPT = {"n_layer": 2, "n_head": HEADS, "n_embd": WIDTH, "n_positions": 256}
_NEOX = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "hidden_size": WIDTH, "max_position_embeddings": 256}
#: causal families of this package, whose code travels with the checkpoint
GROUPED: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gpt_neox": _NEOX | {"intermediate_size": 256, "rotary_pct": 0.25},
    "opt": _NEOX | {"ffn_dim": 256, "word_embed_proj_dim": WIDTH, "dropout": 0.0},
    "biogpt": _NEOX | {"intermediate_size": 256},
    "gptj": _GPT | {"rotary_dim": 16},
    "codegen": _GPT | {"rotary_dim": 16},
    "gpt_neo": {"num_layers": 2, "num_heads": HEADS, "hidden_size": WIDTH, "max_position_embeddings": 256,
                "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "bloom": {"n_layer": 2, "n_head": HEADS, "hidden_size": WIDTH},
    "mpt": {"n_layers": 2, "n_heads": HEADS, "d_model": WIDTH, "max_seq_len": 256, "expansion_ratio": 2},
}  # fmt: skip

SENTENCE_PIECE = ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "phi3")


class Expected(NamedTuple):
    """What transformers says: per prompt, per step, the greedy token and the log probabilities of the likeliest."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[dict[int, float]]]
    #: per step: of the token that was chosen over the next one's
    margin: float
    #: the largest difference of these log probabilities when the KV heads are exchanged
    exchanged: float


def config_of(family: str) -> Any:
    if family in STOCK:
        return transformers.AutoConfig.for_model(family, **{**COMMON, **STOCK[family]})
    ids = {k: COMMON[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    return transformers.AutoConfig.for_model(family, **{**ids, **GROUPED[family]})


def draw(model: Any, seed: int) -> None:
    """Every parameter anew: matrices by their width, norms around one, all of it as fp16 holds it.

    Where the output head is the embedding, words are small and the last norm is large: else every word says itself.
    """
    generator = torch.Generator().manual_seed(seed)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    adds_one = type(model).__name__.startswith("Gemma")  # their norms multiply by 1 + weight
    for name, parameter in model.named_parameters():
        scale, center = 0.1, 0.0
        if parameter.dim() > 1:
            positions, words = "position" in name or "wpe" in name, "embed" in name or "wte" in name
            scale = 1.5 / parameter.shape[-1] ** 0.5
            if positions or words:
                scale = 0.5 if not tied else 0.01
        elif name.endswith("weight"):
            last = ".layers." not in name and ".h." not in name and ".blocks." not in name
            center = 1.0 - float(adds_one)
            if tied and last:
                center = 0.1 if "embed" in name else 30.0
        values = torch.randn(parameter.shape, generator=generator) * scale + center
        parameter.data = values.half().to(parameter.dtype)


def sentence_pieces(folder: Path, text: Path) -> None:
    """``tokenizer.model`` with as many words as the models have, for families whose tokenizer is SentencePiece."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=VOCAB, model_type="bpe",
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()


def byte_pairs(folder: Path, text: Path) -> None:
    """``tokenizer.json``: a byte-level BPE of words in ASCII, since servers withhold halves of a letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    bpe.train([str(text)], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def make(family: str, folder: Path, text: str) -> Path:
    """A multi-head checkpoint of that family, and its conversion to two KV heads by the mean of their groups.

    Returns:
        the folder of the converted one; its weights are fp16.
    """
    source, result, corpus = folder / "source", folder / "converted", folder / "text.txt"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family))
    draw(model, seed=1)
    model.half().save_pretrained(source)
    corpus.write_text("".join(c for c in text if c.isascii()))
    byte_pairs(source, corpus)
    if family in SENTENCE_PIECE:
        sentence_pieces(source, corpus)
    convert(source, result, KV_HEADS, method="mean", with_code=family in GROUPED)
    return result


def exchanged_heads(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Plain attention of an engine that pairs the query heads [B, HQ, S, D] with the wrong one of two KV heads."""
    key, value = (x.flip(1).repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    weights = query @ key.transpose(-1, -2) * (options.get("scaling") or query.shape[-1] ** -0.5)
    if cap := options.get("softcap"):
        weights = cap * (weights / cap).tanh()
    assert mask is not None, "a text without a mask: it would not be causal"
    return ((weights + mask).softmax(-1) @ value).transpose(1, 2), None


transformers.AttentionInterface.register("exchanged_heads", exchanged_heads)
transformers.AttentionMaskInterface.register("exchanged_heads", transformers.AttentionMaskInterface()["eager"])


def load(folder: Path, attention: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    ).eval()


@torch.no_grad()
def greedy(model: Any, prompts: Tensor, steps: int = NEW_TOKENS) -> tuple[Tensor, Tensor]:
    """Tokens [B, steps] and log probabilities [B, steps, V]; every step reads the whole text, without a cache."""
    ids, found = prompts, []
    for _ in range(steps):
        found.append(model(input_ids=ids, use_cache=False).logits[:, -1].double().log_softmax(-1))
        ids = torch.cat([ids, found[-1].argmax(-1, keepdim=True)], 1)
    return ids[:, prompts.shape[1] :], torch.stack(found, 1)


@torch.no_grad()
def scores(model: Any, ids: Tensor, steps: int) -> Tensor:
    """Log probabilities [B, steps, V] of the last ``steps`` tokens of a text."""
    return model(input_ids=ids, use_cache=False).logits[:, -steps - 1 : -1].double().log_softmax(-1)


def as_q8_0(x: Tensor) -> Tensor:
    """What llama.cpp's Q8_0 keeps of a tensor [..., K]: of 32 numbers a scale in fp16, and 8 bits of each."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scale > 0, blocks / scale, 0.0)
    rounded = steps.abs().add(0.5).floor().copysign(steps)  # halves away from zero
    return (rounded * scale.half().float()).flatten(-2)


def load_as(folder: Path, attention: str, q8_0: bool) -> Any:
    """The model in fp32; its matrices as Q8_0 keeps them. Routers stay as they are there."""
    model = load(folder, attention)
    for name, parameter in model.named_parameters():
        if (
            q8_0
            and parameter.dim() > 1
            and not name.endswith(("mlp.gate.weight", "router.weight", "expert_gate.weight"))
        ):
            parameter.data = as_q8_0(parameter.data)
    return model


def expected(folder: Path, q8_0: bool = False) -> Expected:
    """What transformers says of a converted checkpoint in fp32, and how far an engine would be that mixes its heads."""
    model = load_as(folder, "eager", q8_0)
    draw_ids = torch.Generator().manual_seed(7)
    prompts = torch.randint(4, VOCAB, (CANDIDATES, LENGTH), generator=draw_ids)
    tokens, logprobs = greedy(model, prompts)
    top = logprobs.topk(2, -1).values
    margins = (top[..., 0] - top[..., 1]).amin(1)
    different = torch.tensor([len(set(row)) for row in tokens.tolist()])
    margins[(tokens < 4).any(1) | (different < 6)] = -1.0  # special tokens end a text; repetition says little
    best = margins.topk(PROMPTS).indices
    prompts, tokens, logprobs = prompts[best], tokens[best], logprobs[best]
    values, ids = logprobs.topk(TOP, -1)
    other = scores(load_as(folder, "exchanged_heads", q8_0), torch.cat([prompts, tokens], 1), NEW_TOKENS)
    said = [
        [{int(i): float(v) for i, v in zip(*step, strict=True)} for step in zip(*row, strict=True)]
        for row in zip(ids, values, strict=True)
    ]
    difference = float((other.gather(-1, ids) - values).abs().max())
    return Expected(prompts.tolist(), tokens.tolist(), said, float(margins[best].min()), difference)
