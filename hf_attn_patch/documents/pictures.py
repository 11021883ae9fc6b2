"""Pictures with what they show: image files with a text beside them, or a data set with images.

Files are read by Pillow, data sets by datasets.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_attn_patch.errors import TrainingError

from .sources import open_documents

#: of image files; a caption has the same name and ends in .txt
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
#: columns in which data sets keep captions, the first that is there
COLUMNS = ("text", "caption", "sentence", "title")


@dataclass(frozen=True)
class Picture:
    """``image``: PIL.Image in RGB; ``text``: what it shows, where that is known."""

    image: Any
    text: str | None
    name: str


def pictures(source: str, seed: int = 0) -> Iterator[Picture]:
    """The pictures of an image file, of a folder (in an order drawn by ``seed``), or of a data set.

    Raises:
        TrainingError: nothing is there, or it cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        yield _read_file(path)
        return
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES) if path.is_dir() else []
    if files:
        for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist():
            yield _read_file(files[i])
        return
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise TrainingError(f"{source} is no picture; give {', '.join(sorted(SUFFIXES))}, or a folder of them")
    yield from _of_data_set(source, seed)


def _read_file(path: Path) -> Picture:
    beside = path.with_suffix(".txt")
    text = beside.read_text(encoding="utf-8", errors="replace").strip() if beside.is_file() else None
    return Picture(_decoded(path, str(path)), text or None, str(path))


def _decoded(file: Any, name: str) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise TrainingError("pictures are read with Pillow: pip install 'hf-attn-patch[pictures]'") from None
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: of broken PNGs
        raise TrainingError(f"{name} cannot be read as a picture: {' '.join(str(error).split())[:160]}") from None


def _of_data_set(source: str, seed: int) -> Iterator[Picture]:
    records = open_documents(source)
    import datasets

    features = records.features or {}
    column = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        there = ", ".join(features) or "none that are known before it is read"
        raise TrainingError(f"{source} has no column of images (datasets.Image); its columns: {there}")
    texts = next((name for name in COLUMNS if name in features), None)
    records = records.cast_column(column, datasets.Image(decode=False))
    if not Path(source).expanduser().exists():
        records = records.shuffle(seed=seed, buffer_size=100)
    for number, record in enumerate(records):
        found, name = record[column], f"record {number} of {source}"
        raw = found.get("bytes")
        text = (record[texts] or "").strip() if texts else ""
        yield Picture(_decoded(found["path"] if raw is None else io.BytesIO(raw), name), text or None, name)
