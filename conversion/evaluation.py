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
from tqdm import tqdm

from hf_attn_patch.training.errors import TrainingError
from hf_attn_patch.training.losses import Head, linear_loss
from hf_attn_patch.training.models import load_tokenizer
from hf_attn_patch.training.teacher import require_same_vocabulary

from .errors import ConversionError
from .harness import import_lm_eval, run_lm_eval, task_names
from .hub import resolve
from .inspection import inspect_source
from .loadcheck import device_named, quiet
from .report import html_table, human, table


@dataclass
class Evaluation:
    """One model on one text; what needs a source is None without one.

    Attributes:
        loss: cross-entropy in nats a token, over ``scored`` tokens.
        kl: KL(source || model) in nats a token.
        agreement: share of the tokens at which the most likely next word is the source's.
        kv_bytes_per_token: what one more token adds to the KV cache.
        tokens_per_second: greedy decoding of one sequence after ``context`` tokens.
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


class Evaluations(list[Evaluation]):
    """One :class:`Evaluation` a model; as text and in notebooks it is a table."""

    def __str__(self) -> str:
        return evaluation_text(self)

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(line)}</p>" for line in _notes(self))
        return html_table(*_table(self)) + notes


def windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over ``count`` tokens: (begin, end, first token to score). Every token but the first is scored once.

    Beyond the first window every token has at least ``context - stride`` tokens before it.

    >>> list(windows(10, 6, 3))
    [(0, 6, 1), (3, 9, 6), (4, 10, 9)]
    """
    end, scored = min(context, count), 1
    while True:
        yield max(0, end - context), end, scored
        if end == count:
            return
        end, scored = min(end + stride, count), end


@torch.no_grad()
def score(
    model: Any, ids: Tensor, context: int, stride: int, source: Any = None
) -> tuple[float, float | None, float | None, int]:
    """(loss, KL to the source, top-1 agreement, scored tokens) of a causal model on ``ids`` [S]."""
    sums = torch.zeros(3, dtype=torch.float64)
    count, head = 0, Head(None)
    for begin, end, first in windows(len(ids), context, stride):
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
    cache, word = out.past_key_values, out.logits[:, -1:].argmax(-1)
    begun = 0.0
    for step in range(steps + 4):
        if step == 4:  # the first ones warm up
            _wait(model.device)
            begun = time.perf_counter()
        out = model(input_ids=word, past_key_values=cache, use_cache=True)
        cache, word = out.past_key_values, out.logits[:, -1:].argmax(-1)
    _wait(model.device)
    return steps / (time.perf_counter() - begun)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load_causal(name: str, device: torch.device, dtype: str, attention: str) -> Any:
    """A causal language model, ready to be evaluated.

    Raises:
        ConversionError: it cannot be loaded, or is none.
    """
    import transformers

    import hf_attn_patch  # noqa: F401  (registers the attention and the grouped model families)

    with quiet():
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention)
        except (OSError, ValueError, KeyError) as error:
            text = " ".join(str(error).split())[:200]
            raise ConversionError(f"{name} is no causal language model that can be loaded: {text}") from None
    return model.to(device).eval()


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
    attention: str = "hf_attn_patch",
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

    Raises:
        ConversionError: a model or the text is missing or unfit.
    """
    from .calibration_text import documents

    if lm_eval:
        import_lm_eval()
        task_names(lm_eval)
    where = device_named(device)
    if not Path(text).expanduser().is_file():
        raise ConversionError(f"--text: there is no file {text}")
    content = "\n\n".join(documents(str(text), 0))
    truth: Any = None if source is None else load_causal(source, where, dtype, attention)
    if source is not None and not any(_same(name, source) for name in models):
        models = [source, *models]  # what was lost is seen beside what there was
    found = Evaluations()
    for name in tqdm(models, desc="evaluating", unit="model", disable=None):
        is_source = source is not None and _same(name, source)
        model = truth if is_source else load_causal(name, where, dtype, attention)
        try:
            tokenizer = load_tokenizer(name)
            if source is not None and truth is not None:
                require_same_vocabulary(tokenizer, load_tokenizer(source), model.config, truth.config)
        except TrainingError as error:
            raise ConversionError(str(error).replace("the teacher", "the source")) from None
        ids = text_ids(tokenizer, content, tokens)
        if len(ids) and int(ids.max()) >= model.get_input_embeddings().num_embeddings:
            raise ConversionError(f"{name}: its tokenizer has ids that the model has no embedding for")
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or context
        used = min(context, limit)
        loss, kl, agreement, count = score(model, ids, used, stride or max(1, used // 2), None if is_source else truth)
        if is_source:
            kl, agreement = 0.0, 1.0
        room = min(used, limit - 40)
        fast = decoding_speed(model, ids, room) if speed and room > 0 else None
        tasks = run_lm_eval(model, tokenizer, lm_eval) if lm_eval else None
        perplexity = math.exp(min(loss, 700.0))
        found.append(Evaluation(name, loss, perplexity, count, used, kv_bytes(name), fast, kl, agreement, tasks))
        del model
    return found


def _same(name: str, other: str) -> bool:
    """Whether two names are one checkpoint."""
    return name == other or (Path(name).exists() and Path(name).resolve() == Path(other).resolve())


def kv_bytes(name: str) -> int:
    """Bytes that one more token adds to the model's KV cache."""
    return int(inspect_source(resolve(name))["kv_bytes_per_token"])


def _table(found: list[Evaluation]) -> tuple[list[str], list[list[object]]]:
    """(header, rows)."""
    known = [e for e in found if e.kl is not None]
    header = ["model", "loss", "perplexity", *(("KL", "top-1") if known else ()), "KV bytes/token", "tokens/s"]
    rows = []
    for e in found:
        row: list[object] = [e.model, f"{e.loss:.4f}", f"{e.perplexity:.3f}"]
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
    for e in found[:1]:
        lines.append(
            f"{e.scored} tokens scored, each once; windows of {e.context} tokens; KV bytes in a checkpoint's own dtype"
        )
    return lines


def evaluation_text(found: list[Evaluation]) -> str:
    """A table for people."""
    return "\n".join([table(*_table(found)), *_notes(found)])


def evaluation_dict(found: list[Evaluation]) -> list[dict[str, Any]]:
    """``evaluate --json``."""
    return [asdict(e) for e in found]
