"""Text that every machine has on which this runs: the installed Python, and what its packages say of themselves.

Real text beside what a model writes itself: see docs/results.md for what it is worth.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

#: of one file at most, so that long tables do not take the whole
CHARACTERS = 20_000


def installed_documents(seed: int) -> Iterator[str]:
    """The sources of the standard library and the descriptions of the installed packages, in an order drawn by
    ``seed`` from their sorted names: the same on machines with the same Python and packages, wherever they lie."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    below = {
        p: p.relative_to(packages).as_posix() for form in ("METADATA", "*.md", "*.rst") for p in packages.rglob(form)
    }
    sources = {p: p.relative_to(library) for p in library.rglob("*.py")}
    below |= {p: b.as_posix() for p, b in sources.items() if not {"site-packages", "dist-packages"} & set(b.parts)}
    found = sorted(below, key=lambda p: (below[p], p))
    random.Random(seed).shuffle(found)
    for path in found:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # test data that is meant to be broken
            continue
        if text.strip():
            yield text[:CHARACTERS]
