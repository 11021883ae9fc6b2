"""Recordings with what is said in them: sound files with a text beside them, or a data set with sound.

Files are read by soundfile (libsndfile: WAV, FLAC, OGG, MP3, ...), data sets by datasets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.errors import TrainingError, one_line

from .media import Kind, found_in

RECORDINGS = Kind(
    files=frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au"}),
    one="sound file",
    many="sound",
    feature="Audio",
    texts=("text", "sentence", "transcription", "transcript", "normalized_text", "raw_text"),
)


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
    for found in found_in(source, RECORDINGS, seed):
        yield Recording(*_decoded(found.file, found.name), found.text, found.name)


def _decoded(file: Any, name: str) -> tuple[Tensor, int]:
    soundfile = import_soundfile()
    try:
        wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as error:  # soundfile's own are RuntimeErrors
        raise TrainingError(f"{name} cannot be read as sound: {one_line(error)}") from None
    return torch.from_numpy(wave).mean(1), int(rate)


def import_soundfile() -> Any:
    """The library ``soundfile``, or a sentence on how to get it."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without libsndfile
        raise TrainingError(f"sound is read with soundfile: pip install 'hf-attn-patch[audio]' ({error})") from None
    return soundfile
