"""Numbers of bytes, for people."""

from __future__ import annotations


def human(nbytes: float) -> str:
    """Bytes for people.

    >>> human(524288), human(13_500_000_000)
    ('524.3 kB', '13.5 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
