"""The pages that walk through the code, and how they name what is to be read."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs/internals.md", *sorted((ROOT / "docs/decisions").glob("*.md")), ROOT / "CONTRIBUTING.md"]
#: `path.py`, and after a colon the names in it
STATION = re.compile(
    r"`((?:hf_attn_patch|conversion|modeling|examples|tests)/[\w/]+\.py)`(?:: ((?:`[\w.]+`(?:, )?)+))?"
)
