"""Pictures with what they show: image files with a text beside them, or a data set with images.

Files are read by Pillow, data sets by datasets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_attn_patch.errors import TrainingError, one_line

from .media import Kind, found_in

PICTURES = Kind(
    files=frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}),
    one="picture",
    many="images",
    feature="Image",
    texts=("text", "caption", "sentence", "title"),
)


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
    for found in found_in(source, PICTURES, seed):
        yield Picture(_decoded(found.file, found.name), found.text, found.name)


def _decoded(file: Any, name: str) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise TrainingError("pictures are read with Pillow: pip install 'hf-attn-patch[pictures]'") from None
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: of broken PNGs
        raise TrainingError(f"{name} cannot be read as a picture: {one_line(error)}") from None
