"""What a converted model keeps and what it saves: loss, distance to its source, KV bytes, tokens a second."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.compat.calls import Arguments, cache_of
from hf_attn_patch.compat.transformers import attention_name
from hf_attn_patch.conversion.checkpoints.sizes import human
from hf_attn_patch.conversion.loadcheck import device_named
from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.documents.paths import user_path
from hf_attn_patch.documents.positions import positions_of
from hf_attn_patch.documents.tokenizers import load_tokenizer, require_same_vocabulary
from hf_attn_patch.errors import ConversionError, TrainingError
from hf_attn_patch.losses.chunked import Head, linear_loss

from .causal_models import load_causal
from .harness import import_lm_eval, run_lm_eval, task_names
from .report import html_table, table


@dataclass
class Evaluation:
    """One model on one text; what needs a source is None without one.

    Attributes:
        loss: cross-entropy in nats a token, over ``scored`` tokens.
        kl: KL(source || model) in nats a token.
        agreement: share of the tokens at which the most likely next word is the source's.
        kv_bytes_per_token: of keys and values kept after ``context`` tokens, over ``context``.
        tokens_per_second: greedy decoding of one sequence after ``context`` tokens.
        attention: the implementation that ran.
    """

    model: str
    loss: float
    perplexity: float
    scored: int
    context: int
    kv_bytes_per_token: int
    tokens_per_second: float | None = None
    kl: float | None = None
    agreement: float | None = None
    lm_eval: dict[str, Any] | None = None
    attention: str = "hf_attn_patch"


class Evaluations(list[Evaluation]):
    """One :class:`Evaluation` a model; as text and in notebooks it is a table."""

    def __str__(self) -> str:
        return evaluation_text(self)

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(line)}</p>" for line in _notes(self))
        return html_table(*_table(self)) + notes


def windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over ``count`` tokens: (begin, end, first token to score). Every token but the first is scored once.

    Beyond the first window every token has at least ``context - stride`` tokens before it, and at least one: with a
    stride of ``context`` or more, windows share the one token that the next one's first is told from.

    Raises:
        ValueError: ``context`` < 2 or ``stride`` < 1.

    >>> list(windows(10, 6, 3))
    [(0, 6, 1), (3, 9, 6), (4, 10, 9)]
    >>> list(windows(10, 4, 4))
    [(0, 4, 1), (3, 7, 4), (6, 10, 7)]
    """
    if context < 2 or stride < 1:
        raise ValueError(f"windows of {context} tokens that move on by {stride}: at least 2 and 1 are needed")
    end, scored = min(context, count), 1
    while True:
        yield max(0, end - context), end, scored
        if end == count:
            return
        end, scored = min(end + min(stride, context - 1), count), end


@torch.no_grad()
def score(
    model: Any, ids: Tensor, context: int, stride: int, source: Any = None
) -> tuple[float, float | None, float | None, int]:
    """(loss, KL to the source, top-1 agreement, scored tokens) of a causal model on ``ids`` [S]."""
    sums = torch.zeros(3, dtype=torch.float64)
    count, head = 0, Head(None)
    parts = list(windows(len(ids), context, stride))
    for begin, end, first in progress_bar(parts, desc=f"evaluating {model.name_or_path}", unit="window"):
        block = ids[begin:end][None].to(model.device)
        rows = slice(first - begin - 1, end - begin - 1)
        logits = model(input_ids=block, use_cache=False).logits[0, rows]
        told = None if source is None else source(input_ids=block, use_cache=False).logits[0, rows]
        known = {} if told is None else {"teacher_hidden": told, "teacher_head": head, "kl_weight": 1.0}
        part = linear_loss(logits, head, block[0, first - begin :], **known)
        same = 0 if told is None else int((logits.argmax(-1) == told.argmax(-1)).sum())
        sums += torch.tensor([float(part.ce), float(part.kl), same], dtype=torch.float64)
        count += end - first
    loss, kl, agreement = (sums / count).tolist()
    return loss, *((None, None) if source is None else (kl, agreement)), count


@torch.no_grad()
def decoding_speed(model: Any, ids: Tensor, context: int, steps: int = 32) -> float:
    """Tokens a second of greedy decoding after ``context`` tokens of ``ids`` [S] (repeated if they are fewer)."""
    prompt = ids.repeat(-(-context // len(ids)))[:context][None].to(model.device)
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    keyword = Arguments(model).cache or "past_key_values"
    cache, word = cache_of(out), out.logits[:, -1:].argmax(-1)
    begun = 0.0
    for step in range(steps + 4):
        if step == 4:  # the first ones warm up
            _wait(model.device)
            begun = time.perf_counter()
        out = model(input_ids=word, use_cache=True, **{keyword: cache})
        cache, word = cache_of(out), out.logits[:, -1:].argmax(-1)
    _wait(model.device)
    return steps / (time.perf_counter() - begun)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def text_ids(tokenizer: Any, text: str, limit: int | None) -> Tensor:
    """The text's ids [S], after a beginning-of-text token where the tokenizer has one."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if len(ids) < 2:
        raise ConversionError("--text has fewer than two tokens: there is nothing to predict")
    return torch.tensor(ids[:limit] if limit else ids)


def evaluate(
    models: list[str],
    text: str | Path,
    *,
    source: str | None = None,
    context: int = 1024,
    stride: int | None = None,
    tokens: int | None = None,
    speed: bool = True,
    lm_eval: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    attention: str | None = None,
) -> Evaluations:
    """Evaluate causal language models on a text.

    Args:
        models: checkpoint folders or hub ids.
        text: a text file, or JSONL with a field ``text``.
        source: the model that KL and agreement are measured to; evaluated first where it is none of ``models``.
        context: tokens of a window, and before the tokens whose decoding is timed; at most what a model can read.
        stride: by how much windows move on; half of ``context`` by default.
        tokens: of the text at most.
        lm_eval: tasks for lm-evaluation-harness, or YAML files of tasks, with commas.
        attention: an attention implementation; by default ours, and eager for families that cannot take it.

    Raises:
        ConversionError: a model or the text is missing or unfit.
    """
    from hf_attn_patch.conversion.calibration.text import documents, refuse_unknown_ids

    if lm_eval:
        import_lm_eval()
        task_names(lm_eval)
    where = device_named(device)
    if not user_path(text).is_file():
        raise ConversionError(f"--text: there is no file {text}")
    content = "\n\n".join(documents(str(text), 0))
    truth: Any = None if source is None else load_causal(source, where, dtype, attention)
    if source is not None and not any(_same(name, source) for name in models):
        models = [source, *models]  # what was lost is seen beside what there was
    found = Evaluations()
    for name in models:
        is_source = source is not None and _same(name, source)
        model = truth if is_source else load_causal(name, where, dtype, attention)
        try:
            tokenizer = load_tokenizer(name)
            if source is not None and truth is not None:
                require_same_vocabulary(tokenizer, load_tokenizer(source), model.config, truth.config)
        except TrainingError as error:
            raise ConversionError(str(error).replace("the teacher", "the source")) from None
        ids = text_ids(tokenizer, content, tokens)
        refuse_unknown_ids(name, model, ids)
        limit = positions_of(model.config) or context
        if limit < 2:
            raise ConversionError(f"{name} reads {limit} token at a time: nothing can be predicted from it")
        used = min(context, limit)
        kv = kv_bytes_per_token(model, ids[:used])
        loss, kl, agreement, count = score(model, ids, used, stride or max(1, used // 2), None if is_source else truth)
        if is_source:
            kl, agreement = 0.0, 1.0
        room = min(used, limit - 40)
        fast = decoding_speed(model, ids, room) if speed and room > 0 else None
        tasks = run_lm_eval(model, tokenizer, lm_eval) if lm_eval else None
        perplexity = math.exp(min(loss, 700.0))
        how = attention_name(model.config) or "eager"
        found.append(Evaluation(name, loss, perplexity, count, used, kv, fast, kl, agreement, tasks, how))
        del model
    return found


def _same(name: str, other: str) -> bool:
    """Whether two names are one checkpoint."""
    return name == other or (Path(name).exists() and Path(name).resolve() == Path(other).resolve())


@torch.no_grad()
def kv_bytes_per_token(model: Any, ids: Tensor) -> int:
    """Bytes of keys and values that the model keeps after ``ids`` [S], for each of them.

    Measured, so that sliding windows, layers that share their cache and families that cache every query head count as
    what they are.
    """
    out = model(input_ids=ids[None].to(model.device), use_cache=True, logits_to_keep=1)
    total = 0
    cache = cache_of(out)
    for layer in getattr(cache, "layers", ()):
        for kept in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            total += kept.numel() * kept.element_size() if isinstance(kept, Tensor) else 0
    return round(total / len(ids))


def _table(found: list[Evaluation]) -> tuple[list[str], list[list[object]]]:
    """(header, rows)."""
    known = [e for e in found if e.kl is not None]
    header = ["model", "loss", "perplexity", *(("KL", "top-1") if known else ()), "KV bytes/token", "tokens/s"]
    rows = []
    for e in found:
        row: list[object] = [
            e.model,
            f"{e.loss:.4f}",
            f"{e.perplexity:.3f}" if e.perplexity < 1e6 else f"{e.perplexity:.2e}",
        ]
        if e.kl is not None and e.agreement is not None:
            row += [f"{e.kl:.4f}", f"{e.agreement:.1%}"]
        row += [human(e.kv_bytes_per_token), "" if e.tokens_per_second is None else f"{e.tokens_per_second:,.1f}"]
        rows.append(row)
    return header, rows


def _notes(found: list[Evaluation]) -> list[str]:
    """What stands below the table."""
    lines = []
    for e in found:
        for task, metrics in (e.lm_eval or {}).items():
            lines.append(f"{e.model}  {task}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
    for e in found:
        if e.attention == "eager":
            lines.append(f"{e.model} ran with eager attention: its family does not take another implementation")
    for e in found[:1]:
        lines.append(
            f"{e.scored} tokens scored, each once; windows of {e.context} tokens; KV bytes as kept after so many"
        )
    return lines


def evaluation_text(found: list[Evaluation]) -> str:
    """A table for people."""
    return "\n".join([table(*_table(found)), *_notes(found)])


def evaluation_dict(found: list[Evaluation]) -> list[dict[str, Any]]:
    """``evaluate --json``."""
    return [asdict(e) for e in found]
