"""Tiny models of every grouped family, what to feed them, and how their KV heads look when each is written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig

from hf_attn_patch.hf import auto_classes as zoo

BEFORE_5_24 = Version(transformers.__version__) < Version("5.24")  # GPT-J and CodeGen joined the interface in it
HEADS, DIM, VOCAB = 4, 8, 61
E = HEADS * DIM
QUIET = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}


@dataclass(frozen=True)
class Case:
    """One family: ``auto`` loads it, ``config`` makes it tiny, ``expand`` writes its KV heads out for the stock model.

    ``expand(name, tensor, G)`` gives the stock model's tensor for the grouped model's.
    """

    stock: str
    auto: str
    config: dict[str, Any]
    expand: Callable[[str, Tensor, int], Tensor]
    kind: str = "causal"  # causal, encoder, seq2seq, speech, vision, clip
    kv_fields: tuple[str, ...] = ("num_key_value_heads",)
    outside: bool = False  # of transformers' attention interface
    marks: tuple[Any, ...] = field(default=())

    def map_kv(self, name: str, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """A stock tensor with ``change`` applied to its K rows and to its V rows (each [HEADS * DIM, ...])."""
        dim, *parts = stock_rows(self, name)
        out = x.clone()
        for rows in parts:
            index = torch.tensor(rows)
            out.index_copy_(dim, index, change(x.index_select(dim, index).movedim(dim, 0)).movedim(0, dim))
        return out

    @property
    def ours(self) -> str:
        return zoo.PREFIX + self.stock

    @property
    def generates(self) -> bool:
        return self.kind in ("causal", "seq2seq", "speech")

    @property
    def seq2seq(self) -> bool:
        return self.kind in ("seq2seq", "speech")

    def all_attentions(self, kv_heads: int) -> Any:
        """What ``convert`` takes to merge the encoder too, which one number leaves as it is."""
        return {name.removesuffix("_kv_heads"): kv_heads for name in self.kv_fields} if self.seq2seq else kv_heads

    def make_config(self, kv_heads: int | None, **more: Any) -> Any:
        """The stock config, or with ``kv_heads`` ours."""
        kwargs = {**self.config, **more}
        if kv_heads is None:
            return AutoConfig.for_model(self.stock, **kwargs)
        heads = dict.fromkeys(self.kv_fields, kv_heads)
        if self.kind == "clip":
            kwargs = {k: {**v, **heads} if isinstance(v, dict) else v for k, v in kwargs.items()}
        else:
            kwargs |= heads
        return AutoConfig.for_model(self.ours, **kwargs)

    def make(self, kv_heads: int | None, attn: str | None = None, seed: int = 0, **more: Any) -> Any:
        """A model with random weights that are large enough for attention to matter, in eval mode."""
        attn = attn or ("eager" if self.outside and kv_heads is None else "sdpa")
        torch.manual_seed(seed)
        auto = getattr(transformers, self.auto)
        model = auto.from_config(self.make_config(kv_heads, **more), attn_implementation=attn)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if not p.requires_grad:
                    continue  # fixed positions, which some families do not save
                if p.dim() > 1:
                    p.normal_(
                        0, 0.2 if "embed" in name or "wte" in name or "shared" in name else 1.4 / p.shape[-1] ** 0.5
                    )
                elif "norm" not in name.lower() and "ln_" not in name:
                    p.normal_(0, 0.1)
        return model.eval()

    def inputs(self, batch: int = 2, length: int = 7, padding: str | None = None, seed: int = 1) -> dict[str, Tensor]:
        """Model inputs; with ``padding`` ("left", "right") the last row has only length - 3 tokens."""
        g = torch.Generator().manual_seed(seed)
        if self.kind == "vision":
            return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=g)}
        ids = torch.randint(3, VOCAB, (batch, length), generator=g)
        if self.kind == "speech":
            features = torch.randn(batch, 8, 24, generator=g)
            return {"input_features": features, "decoder_input_ids": ids}
        mask = torch.ones_like(ids)
        if padding == "left":
            mask[-1, :3] = 0
        elif padding == "right":
            mask[-1, -3:] = 0
        ids = ids * mask + (1 - mask)
        feed = {"input_ids": ids, "attention_mask": mask}
        if self.kind == "seq2seq":
            feed["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, length - 2), generator=g)
        if self.kind == "clip":
            feed["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=g)
        return feed


def output(model: Any, feed: dict[str, Tensor]) -> Tensor:
    """What a model says: its logits, or its last hidden states."""
    out = model(**feed)
    for name in ("logits", "logits_per_text", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    raise AssertionError(f"{type(model).__name__} gave {list(out)}")


def repeat(x: Tensor, g: int, dim: int = 0) -> Tensor:
    """Each of the heads of DIM numbers along ``dim``, g times in a row."""
    heads = x.split(DIM, dim=dim)
    return torch.cat([h for h in heads for _ in range(g)], dim=dim)


def separate(*names: str) -> Callable[[str, Tensor, int], Tensor]:
    """K and V have parameters of their own, whose module is called one of ``names``."""
    return lambda name, x, g: repeat(x, g) if name.rpartition(".")[0].rpartition(".")[2] in names else x


def per_group(name: str, x: Tensor, g: int) -> Tensor:
    """Rows: per KV head its g queries, key, value -> per head query, key, value."""
    if "query_key_value" not in name:
        return x
    rows = []
    for block in x.split((g + 2) * DIM):
        heads = block.split(DIM)
        for q in heads[:-2]:
            rows += [q, heads[-2], heads[-1]]
    return torch.cat(rows)


def gpt2_columns(name: str, x: Tensor, g: int) -> Tensor:
    """Columns q, k, v."""
    if "c_attn" not in name:
        return x
    kv = E // g
    q, k, v = x.split([E, kv, kv], dim=-1)
    return torch.cat([q, repeat(k, g, -1), repeat(v, g, -1)], dim=-1)


def mpt_rows(name: str, x: Tensor, g: int) -> Tensor:
    """Rows q, k, v."""
    if "Wqkv" not in name:
        return x
    kv = E // g
    q, k, v = x.split([E, kv, kv])
    return torch.cat([q, repeat(k, g), repeat(v, g)])


def codegen_blocks(name: str, x: Tensor, g: int) -> Tensor:
    """Blocks of q, v, k; the stock model has four of them (here of one head each)."""
    if "qkv_proj" not in name:
        return x
    hkv = HEADS // g
    qs: list[Tensor] = []
    vs: list[Tensor] = []
    ks: list[Tensor] = []
    for block in x.chunk({4: 4, 2: 2, 1: 1}[hkv]):
        n = block.shape[0] // DIM  # heads' worth of rows: queries, one value and one key
        q, v, k = block.split([(n - 2) * DIM, DIM, DIM])
        qs, vs, ks = qs + list(q.split(DIM)), vs + [v] * g, ks + [k] * g
    return torch.cat([t for qvk in zip(qs, vs, ks, strict=True) for t in qvk])


def stock_rows(case: Case, name: str) -> tuple[Any, ...]:
    """(dimension, rows of K, rows of V) in a stock tensor, number by number; (0,) if it has none."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    if module in ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin") or (case.stock[-2:] == "t5" and module in "kv"):
        return (0, list(range(E)))
    if module == "c_attn":
        return (-1, list(range(E, 2 * E)), list(range(2 * E, 3 * E)))
    if module == "Wqkv":
        return (0, list(range(E, 2 * E)), list(range(2 * E, 3 * E)))
    if module == "query_key_value":
        k = [3 * DIM * h + DIM + d for h in range(HEADS) for d in range(DIM)]
        return (0, k, [row + DIM for row in k])
    if module == "qkv_proj":  # four blocks of q, v, k
        v = [3 * DIM * h + DIM + d for h in range(HEADS) for d in range(DIM)]
        return (0, [row + DIM for row in v], v)
    return (0,)


_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": E,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}
_NO_DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_NGPT: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": E, "n_head": HEADS, "n_layer": 2, "n_positions": 64, **QUIET}
_NGPT |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "d_kv": DIM,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
}
_T5 |= {"pad_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8}
_BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": E,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
}
_BART |= {"decoder_attention_heads": HEADS, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "dropout": 0.0, **QUIET}
_BART |= {"decoder_start_token_id": 0, "forced_eos_token_id": None, "max_position_embeddings": 64}
_S2S = ("encoder_kv_heads", "decoder_kv_heads", "cross_kv_heads")
_TOWER = {"hidden_size": E, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": HEADS}
_IMAGE = {"image_size": 16, "patch_size": 8}
_FALCON = {k: v for k, v in _TEXT.items() if k != "intermediate_size"} | {"ffn_hidden_size": 48, **QUIET}
_KV, _PROJ = separate("key", "value"), separate("k_proj", "v_proj")

CASES = [
    Case("gpt2", "AutoModelForCausalLM", _NGPT, gpt2_columns),
    Case("gpt_neox", "AutoModelForCausalLM", {**_TEXT, **QUIET, "rotary_pct": 0.5}, per_group),
    Case(
        "opt",
        "AutoModelForCausalLM",
        {**_TEXT, **QUIET, "ffn_dim": 40, "word_embed_proj_dim": E, "dropout": 0.0},
        _PROJ,
    ),
    Case("biogpt", "AutoModelForCausalLM", {**_TEXT, **_NO_DROP, **QUIET, "max_position_embeddings": 64}, _PROJ),
    Case("bert", "AutoModelForMaskedLM", {**_TEXT, **_NO_DROP}, _KV, "encoder"),
    Case("roberta", "AutoModelForMaskedLM", {**_TEXT, **_NO_DROP}, _KV, "encoder"),
    Case("electra", "AutoModelForMaskedLM", {**_TEXT, **_NO_DROP, "embedding_size": 16}, _KV, "encoder"),
    Case(
        "distilbert",
        "AutoModelForMaskedLM",
        {
            "vocab_size": VOCAB,
            "dim": E,
            "n_heads": HEADS,
            "n_layers": 2,
            "hidden_dim": 40,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        separate("k_lin", "v_lin"),
        "encoder",
    ),
    Case("t5", "AutoModelForSeq2SeqLM", _T5, separate("k", "v"), "seq2seq", _S2S),
    Case(
        "mt5", "AutoModelForSeq2SeqLM", {**_T5, "feed_forward_proj": "gated-gelu"}, separate("k", "v"), "seq2seq", _S2S
    ),
    Case("bart", "AutoModelForSeq2SeqLM", _BART, _PROJ, "seq2seq", _S2S),
    Case("mbart", "AutoModelForSeq2SeqLM", _BART, _PROJ, "seq2seq", _S2S),
    Case("marian", "AutoModelForSeq2SeqLM", _BART, _PROJ, "seq2seq", _S2S),
    Case(
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        {
            **{name: value for name, value in _BART.items() if name != "max_position_embeddings"},
            "num_mel_bins": 8,
            "max_source_positions": 12,
            "max_target_positions": 40,
            "begin_suppress_tokens": None,
            "eos_token_id": 2,
        },
        _PROJ,
        "speech",
        _S2S,
    ),
    Case("vit", "AutoModelForImageClassification", {**_TOWER, **_IMAGE, **_NO_DROP}, _PROJ, "vision"),
    Case(
        "clip",
        "AutoModel",
        {
            "text_config": {**_TOWER, "vocab_size": VOCAB, "max_position_embeddings": 20, "eos_token_id": 2},
            "vision_config": {**_TOWER, **_IMAGE},
            "projection_dim": 16,
        },
        _PROJ,
        "clip",
    ),
    Case(
        "bloom",
        "AutoModelForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": E, "n_head": HEADS, "n_layer": 2, **QUIET},
        per_group,
        outside=True,
    ),
    Case(
        "mpt",
        "AutoModelForCausalLM",
        {
            "vocab_size": VOCAB,
            "d_model": E,
            "n_heads": HEADS,
            "n_layers": 2,
            "max_seq_len": 64,
            "use_cache": True,
            **QUIET,
        },
        mpt_rows,
        outside=True,
    ),
    Case("gptj", "AutoModelForCausalLM", {**_NGPT, "rotary_dim": 4}, _PROJ, outside=BEFORE_5_24),
    Case("codegen", "AutoModelForCausalLM", {**_NGPT, "rotary_dim": 4}, codegen_blocks, outside=BEFORE_5_24),
    Case("falcon", "AutoModelForCausalLM", {**_FALCON, "multi_query": False}, per_group, outside=True),
    Case(
        "gpt_neo",
        "AutoModelForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": E,
            "num_heads": HEADS,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 3,
            "max_position_embeddings": 64,
            "resid_dropout": 0.0,
            "embed_dropout": 0.0,
            "attention_dropout": 0.0,
            **QUIET,
        },
        _PROJ,
        outside=True,
    ),
]
BY_NAME = {case.stock: case for case in CASES}
