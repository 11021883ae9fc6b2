"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from hf_attn_patch.errors import ConversionError


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path, with ``~`` as the home it stands for; there need be nothing there.

    Raises:
        ConversionError: it cannot be looked at: too long, a circle of links, a folder that may not be entered.

    >>> user_path("~nobody-of-that-name/x")
    PosixPath('~nobody-of-that-name/x')
    """
    path = Path(os.path.expanduser(text))
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # ValueError: a null character
        shown = str(path)
        shown = shown if len(shown) <= 200 else f"{shown[:100]}...{shown[-97:]}"
        raise ConversionError(f"{shown} cannot be used: {getattr(error, 'strerror', None) or error}") from None
    return path


def files_below(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, sorted; without what is hidden (``.git``, ``._song.wav``) below it,
    wherever the folder itself lies."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))
