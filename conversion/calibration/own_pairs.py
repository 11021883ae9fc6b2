"""Calibration samples of an encoder-decoder of text: its encoder reads something, and its decoder's words are drawn.

What an encoder is for, nobody can sample from it; what its decoder says of anything, it can. So the encoder reads the
user's text, or random ids where there is none, and the labels are the model's own words: of flan-t5-small, whose
answers are short, merging by what it says itself loses less than by spans taken out of the same text or by halves of
it. (What the decoder said, read by the encoder again, once or twice, was measured and is worse:
benchmarks/results/real_models.md.)

Shapes: N samples, S tokens that the encoder reads, T that the decoder does, E model width.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.conversion.processes import current
from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.documents.positions import start_of
from hf_attn_patch.errors import ConversionError

from .gather import OWN, parse_sources
from .layers import as_read
from .samples import Samples, ended
from .text import CHARACTERS, documents, enough, paragraphs, typical_length
from .written_pairs import written

#: bytes of encoder outputs that are kept; more are worked out again when they are read
KEPT = 1 << 32
#: characters of a token that a piece of text has at least, so that it fills a row
SHORTEST = 6
#: positions that an encoder reads at a time
POSITIONS = 1 << 15


def own_pairs(plan: Plan, model: Any, read: Tensor, length: int, about: dict[str, Any]) -> Samples:
    """Let an encoder-decoder of text say something of what it reads.

    Args:
        model: the original, on the device where it runs.
        read: what its encoder reads, [N, S].
        length: T, at most.
        about: what is known of ``read``, to be recorded.

    Raises:
        ConversionError: the config does not say how a decoder begins, or the model cannot run.
    """
    start, end = start_of(plan.config), end_of(plan)
    if start is None:
        raise ConversionError("config.json names no decoder_start_token_id, so its decoder cannot write")
    memory = heard(model, read)
    said = written(model, memory, torch.full((len(read), 1), start), length + 1, end=end, seed=plan.seed)
    ids, kept, labels = ended(said, length, 1, end)
    about = about | {"samples": len(read), "length": read.shape[1], "tokens": int(kept.sum()), "pairs": "own answers"}
    return Samples([read, ids], about, [], kept, labels, memory if memory.nbytes <= KEPT else None)


def end_of(plan: Plan) -> int:
    """The token that ends what a decoder says; where the config names none, the one that it starts with.

    Raises:
        ConversionError: it names neither.
    """
    end = plan.config.eos_token_id
    found: Any = start_of(plan.config) if end is None else end
    if found is None:
        raise ConversionError("config.json names neither eos_token_id nor decoder_start_token_id: no decoder can write")
    return int(found if isinstance(found, int) else found[0])


def read_by_encoder(
    plan: Plan, tokenizer: Any, calibrate: str, *, tokens: int, length: int | None, longest: int
) -> tuple[Tensor, dict[str, Any], list[str]]:
    """What an encoder reads, out of all sources by shares: ``own`` stands for random ids.

    Args:
        tokens: of all rows, at most.
        length: S, of each; None: what a paragraph of the first text has, ``longest`` at most.

    Returns:
        [N, S] in an order drawn by the plan's seed, what to record, and notes for the user.

    Raises:
        ConversionError: a source is missing, or holds less than one row.
    """
    draw = torch.Generator().manual_seed(plan.seed)
    parts: list[Tensor] = []
    about: dict[str, Any] = {"source": calibrate, "seed": plan.seed, "parts": {}}
    sources = parse_sources(calibrate)
    notes: list[str] = []
    for name, share in sorted(sources, key=lambda source: source[0] == OWN):  # texts first: they know a length
        if name == OWN:
            length = length or longest
            rows = torch.randint(0, int(plan.config.vocab_size), (max(1, round(share * tokens) // length), length),
                                 generator=draw)  # fmt: skip
            padding = getattr(plan.config, "pad_token_id", None)
            if isinstance(padding, int):  # no word: some models hide it from their layers by themselves (T5Gemma)
                rows[rows == padding] = (padding + 1) % int(plan.config.vocab_size)
            rows[:, -1] = end_of(plan)
        else:
            texts = enough(documents(name, plan.seed), CHARACTERS * round(share * tokens))
            length = length or min(longest, typical_length(tokenizer, texts))
            wanted = max(1, round(share * tokens) // length)
            found = _rows(tokenizer, texts, length, wanted, draw)
            if not found:
                raise ConversionError(
                    f"--calibrate {name}: no {length} tokens of text in a row; give more of it, or --calibration-length"
                )
            rows = torch.tensor(found)
            if len(rows) < 0.9 * min(wanted, 1000):
                notes.append(f"{name}: only {len(rows)} pieces of text for the encoder; more text gives a better model")
        parts.append(rows)
        about["parts"][name] = len(rows)
    read = torch.cat(parts)
    read = read[torch.randperm(len(read), generator=draw)]
    about["ids_sha256"] = hashlib.sha256(read.numpy().tobytes()).hexdigest()
    return read, about, notes


def _rows(tokenizer: Any, texts: list[str], length: int, wanted: int, draw: torch.Generator) -> list[list[int]]:
    """At most ``wanted`` rows of ``length`` tokens, special ones among them.

    Rows begin where documents do, which may begin with what the model is to do (``summarize: ``). In one long text
    they begin where paragraphs do, and short ones go on with the next. The rest of what is longer makes further rows.
    """
    pieces = texts if len(texts) > 1 else _together(paragraphs(texts), SHORTEST * length)
    found: list[list[int]] = []
    for some in torch.randperm(len(pieces), generator=draw).split(1024):
        cut = tokenizer(
            [pieces[i] for i in some.tolist()], max_length=length, truncation=True, return_overflowing_tokens=True,
            verbose=False,
        )  # fmt: skip
        found += [row for row in cut["input_ids"] if len(row) == length]
        if len(found) >= wanted:
            break
    return found[:wanted]


def _together(texts: list[str], characters: int) -> list[str]:
    """Neighbours joined, until each has so many characters.

    >>> _together(["one", "two", "three", "four"], 5)
    ['one\\n\\ntwo', 'three', 'four']
    """
    found: list[str] = []
    for text in texts:
        if found and len(found[-1]) < characters:
            found[-1] += "\n\n" + text
        else:
            found.append(text)
    return found


@torch.no_grad()
def heard(model: Any, read: Tensor) -> Tensor:
    """The encoder's output [N, S', E] for what it reads (ids, features), on the CPU."""
    encoder, n = model.get_encoder(), len(read)
    mine = current().share(n)
    read = read[mine] if mine.stop > mine.start else read[:1]  # one shows how large the others are
    rows = 8 if read.is_floating_point() or model.device.type != "cuda" else max(1, POSITIONS // read.shape[1])
    parts = progress_bar(read.split(rows), desc="reading", unit="batch", leave=False)
    found = torch.cat([encoder(as_read(part.to(model.device), encoder))[0].cpu() for part in parts])
    return current().gathered(found[: mine.stop - mine.start], n)
