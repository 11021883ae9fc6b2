"""Where documents come from: a data set of the hub, or local text, JSONL and Parquet; always streamed."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any, Literal

from hf_attn_patch.documents.paths import files_below, user_path
from hf_attn_patch.errors import TrainingError, one_line

from .bars import no_progress_bars

logger = logging.getLogger(__name__)

Unit = Literal["auto", "file", "paragraph", "line"]

TEXT_SUFFIXES = {
    ".txt", ".text", ".md", ".rst", ".py", ".c", ".h", ".cc", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".tex",
    ".html", ".xml", ".csv",
}  # fmt: skip
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
#: datasets unpacks these while it reads
PACKED = {".gz", ".bz2", ".xz", ".zst", ".lz4"}


def _suffix(path: Path) -> str:
    """The suffix that says what is in a file, packed or not."""
    suffixes = [s.lower() for s in path.suffixes]
    return next((s for s in reversed(suffixes) if s not in PACKED), "") if suffixes else ""


@no_progress_bars()
def open_documents(
    name: str,
    *,
    fields: tuple[str, ...] = ("text",),
    config: str | None = None,
    split: str = "train",
    pattern: str | None = None,
    unit: Unit = "auto",
) -> Any:
    """A ``datasets.IterableDataset`` of records that have ``fields``.

    Args:
        name: a file, a folder (every text, JSONL or Parquet file below it, in the order of their names; or what
            ``save_to_disk`` of datasets wrote; or a clone of a data set of the hub) or its id on the hub.
        fields: where the records hold their text; plain text has one, ``text``.
        config: the data set's configuration, of one of the hub.
        split: of a data set that has several.
        pattern: which files of a folder, such as ``**/*.py``.
        unit: what one document is in plain text: a file, a paragraph (between blank lines) or a line.
            ``auto``: a file in a folder, a paragraph in a single file.

    Raises:
        TrainingError: nothing is there that can be read, or its files are of several kinds.
    """
    datasets = import_datasets()
    path = user_path(name)
    if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):  # from save_to_disk
        found = datasets.load_from_disk(str(path))
        if isinstance(found, dict):
            if split not in found:
                raise TrainingError(f"{name} has no split {split!r}; it has {', '.join(found)}")
            found = found[split]
        found = found.to_iterable_dataset()
    elif path.exists() and not _is_clone(path):
        files = _files(path, pattern)
        kinds = {TABLES.get(_suffix(f), "text") for f in files}
        if len(kinds) > 1:
            raise TrainingError(f"{name} mixes {' and '.join(sorted(kinds))} files; choose some with --dataset-glob")
        kind = kinds.pop()
        options: dict[str, Any] = {}
        if kind == "text":
            if fields != ("text",):
                raise TrainingError(f"{name} is plain text without fields {', '.join(fields)}; give JSONL or Parquet")
            chosen = unit if unit != "auto" else ("file" if path.is_dir() else "paragraph")
            options = {
                "sample_by": "document" if chosen == "file" else chosen,
                "encoding_errors": "replace",
                "keep_linebreaks": True,
            }
        try:
            found = datasets.load_dataset(
                kind, data_files=[str(f) for f in files], split="train", streaming=True, **options
            )
        except Exception as error:  # of pyarrow, say
            reason = one_line(error)
            raise TrainingError(f"{name} can't be read as {kind} ({type(error).__name__}: {reason})") from error
    else:
        if not path.exists() and (name.startswith((".", "/", "~")) or _suffix(path) in TEXT_SUFFIXES | set(TABLES)):
            raise TrainingError(f"there is no file or folder {name}")
        try:
            found = datasets.load_dataset(str(path) if path.exists() else name, config, split=split, streaming=True)
        except Exception as error:  # the hub fails in many ways; all mean the same to the user
            raise TrainingError(
                f"{name} is neither a local path nor a readable data set of the hub ({type(error).__name__}: {error})"
            ) from error
    return found


def _is_clone(path: Path) -> bool:
    """Whether a folder is a data set of the hub, with a card that says which files are which split's."""
    card = path / "README.md"
    if not card.is_file():
        return False
    with card.open(encoding="utf-8", errors="replace") as file:
        head = [line.rstrip() for line in itertools.islice(file, 200)]
    return head[:1] == ["---"] and any(line in ("configs:", "dataset_info:") for line in head)


def take_fields(record: dict[str, Any], fields: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The texts of one record; a null is an empty text, which is passed over.

    Raises:
        TrainingError: a field is missing or is no text.
    """
    for field in fields:
        if field not in record or not isinstance(record[field], (str, type(None))):
            there = ", ".join(k for k, v in record.items() if isinstance(v, str)) or "none"
            for key, value in record.items():
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    there += f"; {key!r} looks like a chat: make it text with the tokenizer's apply_chat_template first"
                    break
            raise TrainingError(f"records of {name} have no text in field {field!r}; their text fields: {there}")
    return tuple(record[field] or "" for field in fields)


class EmptyRecords:
    """Counts the records that have no text: told at the first and at the end, refused where they are most.

    Args:
        name: of the data set, for messages.
        fields: where texts are looked for.
    """

    #: so many records are looked at before any judgement
    ENOUGH = 64

    def __init__(self, name: str, fields: tuple[str, ...]) -> None:
        self.name, self.where = name, " or ".join(repr(field) for field in fields)
        self.empty = self.seen = 0

    def see(self, texts: tuple[str, ...]) -> bool:
        """Whether a record has all its texts.

        Raises:
            TrainingError: most of the records so far have not.
        """
        self.seen += 1
        whole = all(text.strip() for text in texts)
        if not whole:
            self.empty += 1
            if self.empty == 1:
                logger.warning(
                    "record %d of %s has no text in field %s; such records are passed over and counted",
                    self.seen, self.name, self.where,
                )  # fmt: skip
            if self.seen >= self.ENOUGH:
                self._refuse_most()
        return whole

    def end(self) -> None:
        """All records were seen.

        Raises:
            TrainingError: most of them, or all of a few, have no text.
        """
        if self.seen >= self.ENOUGH:
            self._refuse_most()
        if self.seen and self.empty == self.seen:
            raise TrainingError(
                f"{self.name} holds no text to train on: none of its {self.seen} records has any in field "
                f"{self.where}; is it the right field?"
            )
        if self.empty:
            logger.warning("%d of %d records of %s had no text", self.empty, self.seen, self.name)

    def _refuse_most(self) -> None:
        if 2 * self.empty > self.seen:
            raise TrainingError(
                f"{self.empty} of the first {self.seen} records of {self.name} have no text in field {self.where}: is "
                "it the right field?"
            )


def import_datasets() -> Any:
    """The library ``datasets``, or a sentence on how to get it."""
    try:
        import datasets
    except ImportError as error:
        raise TrainingError("training reads data with datasets: pip install 'hf-attn-patch[train]'") from error
    return datasets


def _files(path: Path, pattern: str | None) -> list[Path]:
    if path.is_file():
        if not path.stat().st_size:
            raise TrainingError(f"{path} is empty; give a file with text")
        return [path]
    if pattern is not None:
        files = [f for f in path.glob(pattern) if f.is_file()]
    else:
        below = files_below(path)
        tables = [f for f in below if _suffix(f) in TABLES]
        files = tables or [f for f in below if _suffix(f) in TEXT_SUFFIXES]
    files = sorted(f for f in files if f.stat().st_size)
    if not files:
        raise TrainingError(f"{path} holds no {'file like ' + pattern if pattern else 'text, JSONL or Parquet file'}")
    return files
