"""A small language model of Python source: its corpus, its training, its loss; what ``quality.py`` measures on.

The corpus is whatever Python source is installed on the machine, so nothing is downloaded. Shapes: B batch, S sequence,
E model width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

HELD_OUT_SHARE = 50  # one file in so many is held out, by the hash of its text
LARGEST_FILE = 200_000  # bytes: beyond that, Python source is mostly generated tables


@dataclass(frozen=True)
class Size:
    """The shape of a model and of its training."""

    hidden: int = 512
    intermediate: int = 1536
    layers: int = 8
    heads: int = 8
    vocab: int = 8192
    seq: int = 1024
    tokens: int = 130_000_000
    batch_tokens: int = 32_768
    lr: float = 1.5e-3
    held_out_tokens: int = 1_000_000
    corpus_bytes: int = 700_000_000

    def config(self, **overrides: Any) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocab,
            max_position_embeddings=self.seq,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
            **overrides,
        )


FULL = Size()
SMALL = Size(128, 352, 4, 8, 2048, 256, 2_000_000, 4096, 4e-3, 50_000, 30_000_000)


def source_files() -> Iterator[tuple[str, bytes]]:
    """Every Python file of the standard library and of the installed packages, in one fixed order, without repeats."""
    import transformers  # where this very interpreter imports from: covers layered environments

    paths = sysconfig.get_paths()
    roots = dict.fromkeys(
        Path(p).resolve() for p in (paths["stdlib"], paths["purelib"], Path(transformers.__file__).parent.parent)
    )
    seen: set[bytes] = set()
    for root in roots:
        for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
            if not path.is_file() or not 0 < path.stat().st_size <= LARGEST_FILE:
                continue
            data = path.read_bytes()
            digest = hashlib.sha256(data).digest()
            if digest not in seen:
                seen.add(digest)
                yield path.relative_to(root).as_posix(), data


@dataclass(frozen=True)
class Corpus:
    """Token ids: one stream to train on, one held out, split by file."""

    train: Tensor
    held_out: Tensor
    about: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Corpus:
        return replace(self, train=self.train.to(device), held_out=self.held_out.to(device))

    def blocks(self, seq: int, seed: int) -> Iterator[Tensor]:
        """Blocks of S + 1 ids in a random order, for ever (a new order each epoch), on the corpus's device."""
        count = (len(self.train) - 1) // seq
        generator = torch.Generator().manual_seed(seed)
        while True:
            for i in torch.randperm(count, generator=generator).tolist():
                yield self.train[i * seq : i * seq + seq + 1]

    def batches(self, tokens: int, batch_tokens: int, seq: int, seed: int) -> Iterator[Tensor]:
        """``tokens`` tokens in all, as int64 batches [B, S + 1]."""
        blocks = self.blocks(seq, seed)
        for _ in range(max(1, round(tokens / batch_tokens))):
            yield torch.stack([next(blocks) for _ in range(max(1, batch_tokens // seq))]).long()


def tokenizer_for(texts: list[str], vocab: int) -> Any:
    """A byte-level BPE of the first 40 million characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sample, taken = [], 0
    for text in texts:
        sample.append(text)
        taken += len(text)
        if taken > 40_000_000:
            break
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|end|>"], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def corpus(size: Size, cache: Path, log: Callable[[str], None] = print) -> Corpus:
    """Collect, train a byte-level BPE, tokenise; kept in ``cache`` for the next run."""
    file = cache / f"corpus-{size.vocab}-{size.corpus_bytes}.pt"
    if file.exists():
        return Corpus(**torch.load(file))
    start = time.time()
    texts: list[tuple[bytes, str]] = []
    total = 0
    for _, data in source_files():
        total += len(data)
        texts.append((hashlib.sha256(data).digest(), data.decode("utf-8", errors="replace")))
    texts.sort()  # by hash: a random order that is the same everywhere
    kept: list[str] = []
    held: list[str] = []
    used = 0
    for digest, text in texts:
        if used >= size.corpus_bytes:
            break
        used += len(text)
        (held if int.from_bytes(digest[-4:], "big") % HELD_OUT_SHARE == 0 else kept).append(text)
    log(f"{len(texts)} files, {total / 1e6:.0f} MB; kept {used / 1e6:.0f} MB ({time.time() - start:.0f} s)")
    tokenizer = tokenizer_for(kept, size.vocab)
    log(f"BPE of {tokenizer.get_vocab_size()} ({time.time() - start:.0f} s)")

    def ids(texts: list[str]) -> Tensor:
        out = []
        for i in range(0, len(texts), 1024):
            for encoding in tokenizer.encode_batch_fast(texts[i : i + 1024]):
                out.append(np.array([*encoding.ids, 0], dtype=np.uint16))
        return torch.from_numpy(np.concatenate(out).astype(np.int16 if size.vocab <= 2**15 else np.int32))

    train, held_out = ids(kept), ids(held)[: size.held_out_tokens]
    about = {
        "files": len(texts),
        "bytes": used,
        "train_tokens": len(train),
        "held_out_tokens": len(held_out),
        "vocab": tokenizer.get_vocab_size(),
    }
    log(
        f"{len(train) / 1e6:.1f}M tokens to train on, {len(held_out) / 1e6:.2f}M held out ({time.time() - start:.0f} s)"
    )
    cache.mkdir(parents=True, exist_ok=True)
    torch.save({"train": train, "held_out": held_out, "about": about}, file)
    return Corpus(train, held_out, about)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: one schedule of its own, whatever the number of tokens."""

    tokens: int
    batch_tokens: int
    lr: float
    warmup: float = 0.02  # share of the steps
    decay: str = "cosine"  # cosine | linear
    floor: float = 0.0  # final share of the peak
    optimizer: str = "adamw"  # adamw | muon
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    distil: bool = False  # KL to a teacher instead of cross-entropy
    hidden: float = 0.0  # weight of the relative error of the hidden states, layer by layer
    only: str = "all"  # all | attention
    attention_lr: float = 1.0  # factor on the learning rate of the attention weights

    def factor(self, step: int, steps: int) -> float:
        warmup = max(1, round(self.warmup * steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.decay == "cosine" else 1 - done
        return self.floor + (1 - self.floor) * shape


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW on everything, or Muon on the layers' matrices and AdamW on the rest."""
    attention: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        inside = ".self_attn." in name
        p.requires_grad_(recipe.only == "all" or inside)
        if p.requires_grad:
            (attention if inside and p.ndim == 2 else matrices if p.ndim == 2 else vectors).append(p)
    fused = next(model.parameters()).is_cuda
    lr, decay = recipe.lr, recipe.weight_decay
    if recipe.optimizer == "muon":
        hidden = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and ".layers." in n]
        rest = [p for n, p in model.named_parameters() if p.requires_grad and not (p.ndim == 2 and ".layers." in n)]
        found: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        ]
        if rest:
            found.append(torch.optim.AdamW(rest, lr=lr, betas=recipe.betas, weight_decay=0.0, fused=fused))
        return found
    groups = [
        {"params": attention, "lr": lr * recipe.attention_lr, "weight_decay": decay},
        {"params": matrices, "lr": lr, "weight_decay": decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=recipe.betas, fused=fused)]


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def forward(model: LlamaForCausalLM, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, S, V] and what every layer gives [B, S, E]: the model's own layers in its own order.

    Written out because hidden states are wanted from compiled layers, which a hook cannot look into.
    """
    inner = model.model
    x = inner.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    turns = inner.rotary_emb(x, position_ids=positions)
    states = []
    for layer in inner.layers:
        x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=turns)
        x = x[0] if isinstance(x, tuple) else x
        states.append(x)
    return model.lm_head(inner.norm(x)), states


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), mean over tokens; logits [B, S, V]."""
    log_p = F.log_softmax(teacher.float(), -1)
    return (log_p.exp() * (log_p - F.log_softmax(logits.float(), -1))).sum(-1).mean()


def train(
    model: LlamaForCausalLM,
    batches: Iterator[Tensor],
    recipe: Recipe,
    teacher: LlamaForCausalLM | None = None,
    log: Callable[[str], None] | None = None,
) -> float:
    """Train ``model`` in place; returns the mean loss of the last tenth of the steps."""
    device = next(model.parameters()).device
    steps = max(1, round(recipe.tokens / recipe.batch_tokens))
    found = optimizers(model, recipe)
    base = [[g["lr"] for g in o.param_groups] for o in found]
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses: list[Tensor] = []
    begun = time.time()
    model.train()
    for step, ids in enumerate(batches):
        factor = recipe.factor(step, steps)
        for optimizer, lrs in zip(found, base, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        with autocast(device):
            logits, states = forward(model, ids[:, :-1])
            if recipe.distil or recipe.hidden:
                assert teacher is not None
                with torch.no_grad():
                    truth, aims = forward(teacher, ids[:, :-1])
        if recipe.distil:
            loss = distillation_loss(logits, truth)
        else:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        total = loss
        if recipe.hidden:
            errors = [relative_error(s, t) for s, t in zip(states, aims, strict=True)]
            total = loss + recipe.hidden * torch.stack(errors).mean()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in found:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if log and (step % max(1, steps // 20) == 0 or step == steps - 1):
            rate = (step + 1) * recipe.batch_tokens / (time.time() - begun)
            log(f"  step {step + 1}/{steps} loss {loss.item():.3f} {rate / 1e3:.0f}k tokens/s")
    for p in model.parameters():
        p.requires_grad_(True)
    model.eval()
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of hidden states [B, S, E] over the teacher's own size."""
    return (student.float() - teacher.float()).square().mean() / teacher.float().square().mean()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: Tensor, seq: int, batch: int = 32) -> float:
    """Mean negative log-likelihood in nats a token over blocks of S."""
    device = next(model.parameters()).device
    count = (len(ids) - 1) // seq
    total = torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    for i in range(0, count, batch):
        rows = [ids[j * seq : j * seq + seq + 1] for j in range(i, min(i + batch, count))]
        block = torch.stack(rows).long()
        with autocast(device):
            logits, _ = forward(model, block[:, :-1])
        total += F.cross_entropy(logits.flatten(0, 1).float(), block[:, 1:].flatten(), reduction="sum").double()
    return float(total) / (count * seq)
