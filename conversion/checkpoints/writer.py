"""A folder that appears whole or not at all.

Everything is written in ``.NAME.hf-attn/out`` beside the folder NAME that it shall become, config.json last, and
renamed at the end. A journal in ``.NAME.hf-attn`` says which work is done, so that a killed run can be resumed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_attn_patch.errors import ConversionError

from .safetensors_header import build_header, tensor_nbytes
from .sizes import human

#: bytes copied at a time: large enough for the disk, small enough for the processor's cache
CHUNK = 4 << 20

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class OutputFolder:
    """The folder ``dst`` in the making; use as a context manager and call :meth:`commit` at the end.

    An exception removes all that was written; an interrupt (Ctrl-C) keeps it for ``resume``.

    Args:
        dst: what shall appear.
        fingerprint: of all that decides the result; only a run with the same one can be resumed.
        overwrite: an existing checkpoint at ``dst`` is replaced at the very end.
        resume: go on where a killed run of the same work stopped (a fresh start if there is none).
    """

    def __init__(self, dst: Path, *, fingerprint: str, overwrite: bool = False, resume: bool = False) -> None:
        self.dst = Path(os.path.realpath(dst))
        self.work = self.dst.parent / f".{self.dst.name}.hf-attn"
        self.out, self.old = self.work / "out", self.work / "old"
        self.done: dict[str, Any] = {}
        self._fingerprint, self._overwrite, self._resume = fingerprint, overwrite, resume
        self._made: list[Path] = []
        self._lock: int | None = None
        self._journal: int | None = None

    def __enter__(self) -> OutputFolder:
        self._make_parents()
        try:
            self._take_lock()
            self._recover()
            check_destination(self.dst, self._overwrite)
            self._start()
        except BaseException:
            self._release()
            self._remove_parents()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None and issubclass(kind, Exception):
            shutil.rmtree(self.out, ignore_errors=True)
            shutil.rmtree(self.work, ignore_errors=True)
        self._release()
        self._remove_parents()
        if isinstance(error, OSError):
            if error.errno in _NO_SPACE:
                raise ConversionError(f"the disk of {self.dst.parent} is full; nothing was left behind") from None
            if error.errno == errno.EFBIG:
                raise ConversionError(
                    f"a file of the result is larger than {self.dst.parent} or a limit (ulimit -f) allows; nothing was "
                    "left behind: --max-shard-size makes smaller ones"
                ) from None
            raise ConversionError(f"{error.filename or self.dst} cannot be used: {error.strerror or error}") from None

    def _make_parents(self) -> None:
        missing = []
        folder = self.dst.parent
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        try:
            for path in reversed(missing):
                path.mkdir()
                self._made.append(path)
        except OSError as error:
            self._remove_parents()
            raise ConversionError(f"{error.filename} cannot be made: {error.strerror}") from None

    def _remove_parents(self) -> None:
        """Remove the parents that this run made, if nothing came of it."""
        for path in reversed(self._made):
            try:
                path.rmdir()
            except OSError:
                return

    def _take_lock(self) -> None:
        try:
            self.work.mkdir(exist_ok=True)
            refuse_foreign(self.work)
            self._lock = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise ConversionError(f"{self.dst.parent} cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            held = False
        else:  # the file that was locked must still be the one that a later run would lock
            path = self.work / "lock"
            held = path.exists() and os.path.samestat(os.fstat(self._lock), path.stat())
        if not held:
            os.close(self._lock)
            self._lock = None
            raise ConversionError(f"another conversion is writing {self.dst} at this moment")

    def _release(self) -> None:
        if self._journal is not None:
            os.close(self._journal)
        if self._lock is not None:
            if not self.out.exists() and not self.old.exists():
                shutil.rmtree(self.work, ignore_errors=True)
            os.close(self._lock)
        self._journal = self._lock = None

    def _recover(self) -> None:
        """Undo what a run that was killed between its last two renames left."""
        if not self.old.exists():
            return
        if (self.dst / "config.json").is_file():  # only the user's own files were still to be brought over
            self._bring_over()
        else:
            os.rename(self.old, self.dst)

    def _start(self) -> None:
        path = self.work / "journal.jsonl"
        if self._resume and self.out.is_dir() and path.exists():
            lines = _journal_lines(path)
            if not lines or lines[0].get("fingerprint") != self._fingerprint:
                raise ConversionError(
                    f"the unfinished conversion in {self.work} is of another source, method or number of heads; "
                    "run without --resume to start anew"
                )
            for line in lines[1:]:
                self.done[line["job"]] = line.get("note")
            # config.json is written last: a run killed after that has only the renaming left to do again
            (self.out / "config.json").unlink(missing_ok=True)
            self._rewrite_journal(path, lines)
        else:
            shutil.rmtree(self.out, ignore_errors=True)
            self._rewrite_journal(path, [{"fingerprint": self._fingerprint}])
            self.out.mkdir()
        self._journal = os.open(path, os.O_WRONLY | os.O_APPEND)

    def _rewrite_journal(self, path: Path, lines: list[dict[str, Any]]) -> None:
        """Also drops a last line that a kill cut off."""
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def mark(self, job: str, note: Any = None) -> None:
        """Record that a job's bytes are written (one append: atomic for readers of whole lines, from any thread)."""
        if self._journal is None:
            raise AssertionError("the folder is not open")
        os.write(self._journal, (json.dumps({"job": job, "note": note}) + "\n").encode())
        self.done[job] = note

    def allocate(
        self, name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> dict[str, int]:
        """Make a safetensors file of the right size with its header; returns each tensor's offset in it."""
        head, offsets = build_header(tensors, metadata)
        size = max([len(head), *(offsets[n] + tensor_nbytes(*tensors[n]) for n in tensors)])
        descriptor = os.open(self.out / name, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.ftruncate(descriptor, size)
            write_at(descriptor, memoryview(head), 0)
        finally:
            os.close(descriptor)
        return offsets

    def write_text(self, name: str, text: str) -> None:
        (self.out / name).write_text(text, encoding="utf-8")

    def copy(self, source: Path, name: str) -> None:
        """Bring a small file along."""
        (self.out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, self.out / name)

    def commit(self, config: str) -> None:
        """Write config.json, without which nothing loads, and let the folder appear under its name."""
        self.write_text("config.json", config)
        if self.dst.exists():
            check_destination(self.dst, self._overwrite)
            if any(self.dst.iterdir()):
                os.rename(self.dst, self.old)
        os.rename(self.out, self.dst)
        self._made.clear()
        self._bring_over()
        shutil.rmtree(self.work, ignore_errors=True)

    def _bring_over(self) -> None:
        """Of what stood in DST before, the files that are no part of a checkpoint stay in DST."""
        if not self.old.exists():
            return
        replaced = checkpoint_files(self.old)
        for path in sorted(p for p in self.old.rglob("*") if not p.is_dir() or p.is_symlink()):
            name = path.relative_to(self.old)
            target = self.dst / name
            if name.as_posix() not in replaced and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(path, target)
        shutil.rmtree(self.old)


def _journal_lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break  # cut off by the kill
        if not isinstance(line, dict) or not _is_journal_line(line, first=not lines):
            break  # damaged: what it and the lines after it say is done again
        lines.append(line)
    return lines


def _is_journal_line(line: dict[str, Any], first: bool) -> bool:
    if first:
        return isinstance(line.get("fingerprint"), str)
    job, note = line.get("job"), line.get("note")
    if not isinstance(job, str):
        return False
    if job.startswith("unit "):  # {tensor: sha256}
        return isinstance(note, dict) and all(isinstance(value, str) for value in note.values())
    return job.startswith("copy ") or (job == "details" and (note is None or isinstance(note, dict)))


#: what transformers writes of a model and its tokenizer
CHECKPOINT_NAMES = re.compile(
    r"(config|generation_config|conversion|\w*processor_config|tokenizer\w*|special_tokens_map|added_tokens|vocab"
    r"|chat_template)\.(json|model|txt|jinja)|merges\.txt|README\.md|.*\.(safetensors|bin|index\.json)"
)

#: all that is ever in a work folder
_WORK_NAMES = {"lock", "journal.jsonl", "out", "old"}


def refuse_foreign(work: Path) -> None:
    """A work folder that somebody else prepared could lead what is written and removed elsewhere.

    Raises:
        ConversionError: it is a link, of another user, or holds what no conversion puts there.
    """
    way = "remove it, or choose another DST"
    if work.is_symlink():
        raise ConversionError(f"{work} is a link to {os.path.realpath(work)}, where nothing will be touched: {way}")
    if work.stat().st_uid != os.geteuid():
        raise ConversionError(f"{work} belongs to another user: {way}")
    for entry in os.scandir(work):
        folder = entry.name in ("out", "old")
        plain = entry.is_dir(follow_symlinks=False) if folder else entry.is_file(follow_symlinks=False)
        if entry.name not in _WORK_NAMES or not plain or (not folder and entry.stat().st_nlink > 1):
            raise ConversionError(f"{entry.path} was not made by a conversion: {way}")


def checkpoint_files(folder: Path) -> set[str]:
    """The names in ``folder`` that belong to its checkpoint: those that a conversion recorded, or those of weights."""
    try:
        recorded = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))["files"]
        if isinstance(recorded, list) and all(isinstance(name, str) for name in recorded):
            return set(recorded)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # no record, or one from before files were recorded: names tell
    return {path.name for path in folder.iterdir() if CHECKPOINT_NAMES.fullmatch(path.name)}


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def check_destination(dst: Path, overwrite: bool) -> None:
    """Refuse a destination that holds anything, unless it is a checkpoint and may be overwritten."""
    if not dst.exists():
        return
    if not dst.is_dir():
        raise ConversionError(f"{dst} exists and is not a folder")
    if os.path.ismount(os.path.realpath(dst)):  # a folder cannot take the place of a mount point
        raise ConversionError(f"{dst} is a mount point: give a folder inside it, such as {dst / 'converted'}")
    if not any(dst.iterdir()):
        return
    if not overwrite:
        raise ConversionError(f"{dst} exists; choose another folder or pass --overwrite")
    if not (dst / "config.json").is_file():
        raise ConversionError(f"{dst} exists and holds no checkpoint (no config.json), so it will not be overwritten")


def check_apart(src: Path, dst: Path) -> None:
    """SRC is never overwritten: refuse a destination that is the source, holds it, or lies in it."""
    a, b = Path(os.path.realpath(src)), Path(os.path.realpath(dst))
    if a == b:
        raise ConversionError(f"the destination {dst} is the source itself; choose another folder")
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise ConversionError(f"the destination {dst} and the source {src} lie in one another; choose another folder")


def check_space(dst: Path, needed: int) -> None:
    """Say before starting that the disk is too full."""
    folder = Path(os.path.realpath(dst)).parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConversionError(f"the disk of {folder} has {human(free)} free, but the conversion needs {human(needed)}")
