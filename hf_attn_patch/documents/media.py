"""Where sound and pictures lie: a file, a folder of files with texts beside them, or a data set with such a column."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_attn_patch.errors import TrainingError

from .paths import files_below, user_path
from .sources import open_documents


class Kind(NamedTuple):
    """What is looked for.

    Attributes:
        files: suffixes of its files; the text of one has the same name and ends in .txt.
        one, many: what one of them, and a column of them, is called.
        feature: the name of the ``datasets`` feature.
        texts: columns in which data sets keep its texts; the first that is there counts.
    """

    files: frozenset[str]
    one: str
    many: str
    feature: str
    texts: tuple[str, ...]


class Found(NamedTuple):
    """Something to decode: a path or a file in memory, the text that belongs to it, and its name for messages."""

    file: Any
    text: str | None
    name: str


def found_in(source: str, kind: Kind, seed: int) -> Iterator[Found]:
    """What there is of ``kind`` in a file, a folder (in an order drawn by ``seed``), or a data set.

    Raises:
        TrainingError: nothing is there, or it cannot be read.
    """
    path = user_path(source)
    if path.is_file() and path.suffix.lower() in kind.files:
        yield _of_file(path)
        return
    files = [f for f in files_below(path) if f.suffix.lower() in kind.files] if path.is_dir() else []
    if files:
        for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist():
            yield _of_file(files[i])
        return
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise TrainingError(f"{source} is no {kind.one}; give {', '.join(sorted(kind.files))}, or a folder of them")
    yield from _of_data_set(source, kind, seed)


def _of_file(path: Path) -> Found:
    beside = path.with_suffix(".txt")
    text = beside.read_text(encoding="utf-8", errors="replace").strip() if beside.is_file() else None
    return Found(path, text or None, str(path))


def _of_data_set(source: str, kind: Kind, seed: int) -> Iterator[Found]:
    records = open_documents(source)
    import datasets

    features, wanted = records.features or {}, getattr(datasets, kind.feature)
    column = next((name for name, feature in features.items() if isinstance(feature, wanted)), None)
    if column is None:
        there = ", ".join(features) or "none that are known before it is read"
        raise TrainingError(f"{source} has no column of {kind.many} (datasets.{kind.feature}); its columns: {there}")
    texts = next((name for name in kind.texts if name in features), None)
    records = records.cast_column(column, wanted(decode=False))
    if not user_path(source).exists():
        records = records.shuffle(seed=seed, buffer_size=100)
    for number, record in enumerate(records):
        raw = record[column].get("bytes")
        text = (record[texts] or "").strip() if texts else ""
        file = record[column]["path"] if raw is None else io.BytesIO(raw)
        yield Found(file, text or None, f"record {number} of {source}")
