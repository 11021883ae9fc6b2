"""Recordings with what is said in them: sound files with a text beside them, or a data set with sound.

Files are read by soundfile (libsndfile: WAV, FLAC, OGG, MP3, ...), data sets by datasets.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.documents.paths import user_path
from hf_attn_patch.errors import TrainingError

from .sources import open_documents

#: of sound files; a transcript has the same name and ends in .txt
SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au"}
#: columns in which data sets keep transcripts, the first that is there
COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_text")


@dataclass(frozen=True)
class Recording:
    """Sound [T] fp32, one channel; ``rate`` samples a second; ``text``: what is said, where that is known."""

    wave: Tensor
    rate: int
    text: str | None
    name: str

    def at(self, rate: int) -> Tensor:
        """The sound at another rate, [T * rate / self.rate].

        Exact for what both rates can hold: its spectrum is cut off, or filled up with zeros.
        """
        if rate == self.rate or not len(self.wave):
            return self.wave
        length = max(1, round(len(self.wave) * rate / self.rate))
        spectrum = torch.fft.rfft(self.wave.double())
        kept = min(len(spectrum), length // 2 + 1)
        moved = torch.zeros(length // 2 + 1, dtype=spectrum.dtype)
        moved[:kept] = spectrum[:kept]
        return (torch.fft.irfft(moved, n=length) * (length / len(self.wave))).float()


def recordings(source: str, seed: int = 0) -> Iterator[Recording]:
    """The recordings of a sound file, of a folder (in an order drawn by ``seed``), or of a data set.

    Raises:
        TrainingError: nothing is there, or it cannot be read.
    """
    path = user_path(source)
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        yield _read_file(path)
        return
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES) if path.is_dir() else []
    if files:
        for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist():
            yield _read_file(files[i])
        return
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise TrainingError(f"{source} is no sound file; give {', '.join(sorted(SUFFIXES))}, or a folder of them")
    yield from _of_data_set(source, seed)


def _read_file(path: Path) -> Recording:
    beside = path.with_suffix(".txt")
    text = beside.read_text(encoding="utf-8", errors="replace").strip() if beside.is_file() else None
    return Recording(*_decoded(path, str(path)), text or None, str(path))


def _decoded(file: Any, name: str) -> tuple[Tensor, int]:
    soundfile = import_soundfile()
    try:
        wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as error:  # soundfile's own are RuntimeErrors
        raise TrainingError(f"{name} cannot be read as sound: {' '.join(str(error).split())[:160]}") from None
    return torch.from_numpy(wave).mean(1), int(rate)


def import_soundfile() -> Any:
    """The library ``soundfile``, or a sentence on how to get it."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without libsndfile
        raise TrainingError(f"sound is read with soundfile: pip install 'hf-attn-patch[audio]' ({error})") from None
    return soundfile


def _of_data_set(source: str, seed: int) -> Iterator[Recording]:
    records = open_documents(source)
    import datasets

    features = records.features or {}
    column = next((name for name, kind in features.items() if isinstance(kind, datasets.Audio)), None)
    if column is None:
        there = ", ".join(features) or "none that are known before it is read"
        raise TrainingError(f"{source} has no column of sound (datasets.Audio); its columns: {there}")
    texts = next((name for name in COLUMNS if name in features), None)
    records = records.cast_column(column, datasets.Audio(decode=False))
    if not user_path(source).exists():
        records = records.shuffle(seed=seed, buffer_size=100)
    for number, record in enumerate(records):
        sound, name = record[column], f"record {number} of {source}"
        raw = sound.get("bytes")
        wave, rate = _decoded(sound["path"] if raw is None else io.BytesIO(raw), name)
        text = (record[texts] or "").strip() if texts else ""
        yield Recording(wave, rate, text or None, name)
