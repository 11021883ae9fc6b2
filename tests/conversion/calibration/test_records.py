"""JSONL as the world writes it: marks, line ends, halves of characters, any depth."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_attn_patch.conversion import ConversionError
from hf_attn_patch.conversion.calibration.text import documents


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        (b'\xef\xbb\xbf{"text": "a b"}\n', ["a b"]),  # a mark that says UTF-8
        (rb'{"text": "a \ud834 b \ud834\udd1e"}', ["a \ufffd b \U0001d11e"]),  # half a character, and a whole one
        (b'{"text": "a", "id": NaN}\r\n\r\n{"text": "b"}\r\n', ["a", "b"]),
    ],
)
def test_records_as_the_world_writes_them(raw: bytes, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(raw)
    assert list(documents(str(tmp_path / "a.jsonl"), 0)) == texts


def test_records_of_any_depth_are_refused_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ' + "[" * 5000 + "]" * 5000 + "}\n")
    with pytest.raises(ConversionError, match="line 2"):
        list(documents(str(tmp_path / "a.jsonl"), 0))
