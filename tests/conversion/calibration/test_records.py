"""JSONL as the world writes it: marks, line ends, halves of characters, any depth."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path

import datasets
import pytest

from hf_attn_patch.conversion import ConversionError
from hf_attn_patch.conversion.calibration.gather import parse_sources
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


def test_a_list_of_records_and_packed_files_are_read_as_folders_of_them_are(tmp_path: Path) -> None:
    texts = ["one two", "three\nfour"]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], indent=1))
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress("".join(f'{{"text": {json.dumps(t)}}}\n' for t in texts).encode())
    )
    for name in ("a.json", "a.jsonl.gz"):
        assert list(documents(str(tmp_path / name), 0)) == texts
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": [1]}]')
    with pytest.raises(ConversionError, match="record 2 has no field"):
        list(documents(str(tmp_path / "a.json"), 0))


def test_a_few_bytes_of_another_encoding_are_told(tmp_path: Path) -> None:
    """Latin-1 with one accent is no Latin-1 for sure: it is read, and where it stands is said."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_bytes(b"one line\n" + "a café by the sea, and more plain words".encode("latin-1"))
    with pytest.warns(UserWarning, match=r"a.txt, line 2: byte 0xe9 is not UTF-8.*iconv -f LATIN1") as told:
        (text,) = documents(str(folder / "a.txt"), 0)
    assert len(told) == 1 and "caf\ufffd by" in text
    with pytest.warns(UserWarning, match="document 1 has U[+]FFFD") as told:
        assert len(list(documents(str(folder), 0))) == 2
    assert len(told) == 1
    (folder / "a.txt").write_text("meant as it is: \ufffd", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(documents(str(folder / "a.txt"), 0))


def test_what_is_no_text_in_a_folder_or_a_table(tmp_path: Path) -> None:
    """A file in UTF-16 is refused there as it is alone; records without text are passed over, all of them refused."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("plain text")
    (folder / "b.txt").write_bytes("text of two bytes a letter".encode("utf-16"))
    with pytest.raises(ConversionError, match=r"document 2, which begins with .* is no text"):
        list(documents(str(folder), 0))
    table = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["one", None, "", "two"]}).to_parquet(table)
    assert list(documents(str(table), 0)) == ["one", "two"]
    datasets.Dataset.from_dict({"text": [" ", ""]}).to_parquet(table)
    with pytest.raises(ConversionError, match="none of its 2 records"):
        list(documents(str(table), 0))


@pytest.mark.parametrize("sources", [",", "own,", "own,,python"])
def test_sources_without_a_name_are_not_the_folder_that_one_stands_in(sources: str) -> None:
    with pytest.raises(ConversionError, match="no source between two commas"):
        parse_sources(sources)


def test_records_of_any_depth_are_refused_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ' + "[" * 5000 + "]" * 5000 + "}\n")
    with pytest.raises(ConversionError, match="line 2"):
        list(documents(str(tmp_path / "a.jsonl"), 0))
