"""The calibration text: a file, JSONL, a folder or a data set, cut into sequences of equal length."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.conversion.plan_data import Plan
from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.documents.paths import user_path
from hf_attn_patch.documents.positions import positions_of
from hf_attn_patch.documents.sources import PACKED
from hf_attn_patch.documents.tokenizers import load_tokenizer
from hf_attn_patch.errors import ConversionError, TrainingError, one_line

from .installed import installed_documents

#: characters read for each token that is wanted: more than a token has, so that a seed can choose among them
CHARACTERS = 12
#: what stands for the text of the installed Python (:mod:`.installed`)
INSTALLED = "python"
#: files with a record a line (or a list of them); files that datasets reads: tables, and what it unpacks
JSON, TABLES = (".jsonl", ".json", ".ndjson"), (".parquet", *sorted(PACKED))
#: fewer tokens say nothing about a layer's inputs
FEWEST = 16


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ConversionError: it cannot be read, or is no text.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}") from None
    text = raw.decode("utf-8-sig", errors="replace")
    if b"\0" in raw or text.count("\ufffd") > len(text) / 10:
        raise ConversionError(f"{path} is no text (it has bytes that are not UTF-8); give text, JSONL or a data set")
    if not text.strip():
        raise ConversionError(f"{path} holds no text")
    _tell_of_other_encodings(raw, path)
    return text


def _tell_of_other_encodings(raw: bytes, path: Path) -> None:
    """Warn of a few bytes that are not UTF-8: too few say nothing about which encoding they are of."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        warnings.warn(
            f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8, and it and others like it were read as "
            f"U+FFFD; if the file is Latin-1, say, convert it: iconv -f LATIN1 -t UTF-8 {path.name}",
            stacklevel=3,
        )


def documents(source: str, seed: int) -> Iterator[str]:
    """The texts of ``source``: a text file, JSONL or Parquet with a field ``text``, a folder, the id of a data set,
    or ``python``: the sources and documents of the installed Python.

    Raises:
        ConversionError: there is nothing of the kind.
    """
    path = user_path(source)
    if source == INSTALLED and not path.exists():
        yield from installed_documents(seed)
    elif path.is_file() and path.suffix.lower() in JSON:
        try:
            yield from _json_lines(path)
        except TrainingError as error:
            raise ConversionError(str(error)) from None
    elif path.is_file() and path.suffix.lower() not in TABLES:
        yield read_text(path)
    else:
        try:
            yield from _records(source, None if path.exists() else seed)
        except TrainingError as error:
            raise ConversionError(f"--calibrate: {error}") from None
        except ConversionError:
            raise
        except Exception as error:  # a table or a data set that is broken in any way
            text = one_line(error)
            raise ConversionError(f"--calibrate {source} cannot be read: {type(error).__name__}: {text}") from None


def _records(source: str, seed: int | None) -> Iterator[str]:
    """The texts of a table, a folder or a data set; with a ``seed`` in an order drawn by it."""
    from hf_attn_patch.documents.sources import EmptyRecords, open_documents, take_fields

    records, empty, odd = open_documents(source), EmptyRecords(source, ("text",)), False
    for number, record in enumerate(records if seed is None else records.shuffle(seed=seed, buffer_size=1000), 1):
        (text,) = take_fields(record, ("text",), source)
        if text.count("\0") + text.count("\ufffd") > len(text) / 10:
            raise ConversionError(
                f"--calibrate {source}: document {number}, which begins with {text[:20]!r}, is no text (it has bytes "
                "that are not UTF-8); convert it, or leave it out"
            )
        if "\ufffd" in text and not odd:
            odd = True
            warnings.warn(
                f"--calibrate {source}: document {number} has U+FFFD in it, which stands for bytes that are not UTF-8; "
                "if that is not meant, convert the file to UTF-8, or leave it out",
                stacklevel=3,
            )
        if empty.see((text,)):
            yield text
    empty.end()


def _json_lines(path: Path) -> Iterator[str]:
    from hf_attn_patch.documents.sources import EmptyRecords

    empty = EmptyRecords(str(path), ("text",))
    for where, record in _json_records(path):
        text = record.get("text", "") if isinstance(record, dict) else 0
        if not isinstance(text, (str, type(None))):
            raise ConversionError(f'{path}, {where} has no field "text" with a text in it')
        if empty.see((text or "",)):
            yield _whole_characters(str(text))
    empty.end()


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of JSONL, or of one list of them (as .json often has), each with where it stands."""
    text = read_text(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            yield from ((f"record {number}", record) for number, record in enumerate(json.loads(text), 1))
        except (ValueError, RecursionError):
            raise ConversionError(f"{path} begins like a list, and is no JSON") from None
        return
    # not splitlines(): JSON may hold U+2028, U+0085 and the like as they are
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError):
            raise ConversionError(f"{path}, line {number} is no JSON; JSONL has one object a line") from None


def _whole_characters(text: str) -> str:
    """Half characters (``\\ud800`` alone is legal JSON, and no text) as undecodable bytes are read."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def calibration_ids(
    tokenizer: Any, source: str, *, tokens: int, length: int | None, longest: int, seed: int, whole: bool
) -> tuple[Tensor, dict[str, Any], list[str]]:
    """Sequences of calibration text.

    Args:
        tokens: how many at most.
        length: S, of each sequence; less where the text has fewer tokens than that. None: ``longest``; with ``whole``
            what a paragraph (a document of JSONL or a data set) has, if that is less: an encoder of sentences must
            be shown sentences.
        longest: what the model can read, or is of use.
        seed: chooses sequences where there are more than wanted.
        whole: every sequence gets the tokenizer's special tokens ([CLS] ... [SEP]), as encoders expect; otherwise
            documents follow one another with an end-of-text token between.

    Returns:
        ids [N, S] int64, what to record of them, and notes for the user.

    Raises:
        ConversionError: there is no text, or next to none.
    """
    if tokens < FEWEST:
        raise ConversionError(f"--calibration-tokens {tokens}: give at least {FEWEST}")
    limit = CHARACTERS * tokens
    texts = enough(documents(source, seed), limit)
    if whole:
        length = length or min(longest, typical_length(tokenizer, texts))
        joined = "\n\n".join(texts)[:limit]
        rows = _windows(tokenizer, joined, length)
    else:
        length = length or longest
        rows = _stream(tokenizer, [text[:limit] for text in texts], length)
    found = sum(map(len, rows))
    if found < FEWEST:
        read = min(sum(map(len, texts)), limit)
        broken = "; are the tokenizer's files beside the weights?" if read > 50 * FEWEST else ""
        raise ConversionError(
            f"--calibrate {source}: {found} tokens of text ({read} characters) are too few to calibrate on{broken}"
        )
    full = [row for row in rows if len(row) == length] or [max(rows, key=len)]
    ids = torch.tensor(full, dtype=torch.int64)
    chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    ids = ids[chosen[: max(1, tokens // ids.shape[1])]]
    notes = []
    if ids.numel() < 0.9 * min(tokens, 50_000):
        notes.append(
            f"only {ids.numel()} tokens of calibration text ({tokens} are asked for); more text gives a better model"
        )
    about = {
        "source": source,
        "seed": seed,
        "sequences": len(ids),
        "length": ids.shape[1],
        "tokens": ids.numel(),
        "ids_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
    }
    return ids, about, notes


def enough(texts: Iterator[str], limit: int) -> list[str]:
    """The first texts, until there are more than ``limit`` characters."""
    found: list[str] = []
    characters = 0  # a bar that is hidden does not count
    with progress_bar(desc="reading text", unit="char", total=limit, unit_scale=True, leave=False) as bar:
        for text in texts:
            found.append(text)
            characters += len(text)
            bar.update(len(text))
            if characters > limit:
                break
    return found


def paragraphs(texts: list[str]) -> list[str]:
    """What stands between blank lines; in one text without blank lines every line.

    >>> paragraphs(["one\\ntwo\\n\\nthree"]), paragraphs(["one\\ntwo"])
    (['one\\ntwo', 'three'], ['one', 'two'])
    """
    pieces = [piece for text in texts for piece in re.split(r"\n\s*\n", text)]
    if len(pieces) == 1:
        pieces = pieces[0].splitlines()
    return [piece for piece in pieces if piece.strip()]


def typical_length(tokenizer: Any, texts: list[str], sample: int = 1000) -> int:
    """The median number of tokens, special ones included, of a paragraph (:func:`paragraphs`); at least 8."""
    pieces = paragraphs(texts)
    pieces = pieces[:: max(1, len(pieces) // sample)]
    counts = sorted(len(tokenizer(piece[: 1 << 14], verbose=False)["input_ids"]) for piece in pieces)
    return max(8, counts[len(counts) // 2]) if counts else 8


def _stream(tokenizer: Any, texts: list[str], length: int) -> list[list[int]]:
    """Documents one after the other, cut every ``length`` tokens."""
    stream: list[int] = []
    end = tokenizer.eos_token_id
    piece = 1 << 16  # characters at a time: tokenizers take long over long texts
    for text in texts:
        pieces = [text[start : start + piece] for start in range(0, len(text), piece)]
        if pieces:  # together: fast tokenizers take one each on every processor
            for part in tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]:
                stream += part
        stream += [] if end is None else [end]
    return [stream[i : i + length] for i in range(0, len(stream), length)]


def _windows(tokenizer: Any, text: str, length: int) -> list[list[int]]:
    """One text in windows of ``length`` tokens, each with the special tokens around it."""
    rows: list[list[int]] = []
    piece = 1 << 16
    for start in range(0, len(text), piece):
        cut = tokenizer(
            text[start : start + piece], max_length=length, truncation=True, return_overflowing_tokens=True
        )["input_ids"]
        rows += cut if cut and isinstance(cut[0], list) else [cut]
    return rows


def tokenizer_of(plan: Plan) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        ConversionError: it comes without one.
    """
    try:
        return load_tokenizer(str(plan.source.folder))
    except TrainingError as error:
        raise ConversionError(f"--calibrate: {error}; put the tokenizer's files beside the weights") from None


def refuse_unknown_ids(name: str, model: Any, ids: Tensor) -> None:
    """See that a model has an embedding for all ``ids`` of its tokenizer, of any shape.

    Raises:
        ConversionError: it has not.
    """
    if ids.numel() and int(ids.max()) >= model.get_input_embeddings().num_embeddings:
        raise ConversionError(f"{name}: its tokenizer has ids that the model has no embedding for")


def longest(plan: Plan, at_most: int, asked: int | None = None) -> int:
    """Tokens of a calibration sequence: what the model can read, and no more than ``at_most``.

    Raises:
        ConversionError: ``asked`` is more than that.
    """
    limit = positions_of(plan.text_config)
    if asked is not None and limit and asked > limit:
        raise ConversionError(f"--calibration-length {asked}: give at most the {limit} positions of {plan.source.name}")
    return min(at_most, max(2, int(limit or at_most) - 2))
