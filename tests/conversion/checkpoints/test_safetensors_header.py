"""The header parser against the library's own, on headers that are right, broken, and random."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from hf_attn_patch.conversion import ConversionError
from hf_attn_patch.conversion.checkpoints.safetensors_header import (
    build_header,
    parse_header,
    parse_index,
    read_header,
    tensor_nbytes,
)
from hf_attn_patch.documents.stranger_json import parse_json_object

#: what the installed safetensors also knows
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3"]


def library_accepts(raw: bytes) -> bool:
    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return False
    return True


def we_accept(raw: bytes) -> bool:
    try:
        parse_header(raw, len(raw), "file")
    except ConversionError:
        return False
    return True


def file_of(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_as_the_library_does(raw: bytes) -> None:
    assert we_accept(raw) <= library_accepts(raw)


names = st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3)


@given(st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=5))
def test_what_we_build_the_library_reads(described: dict[str, tuple[str, list[int]]]) -> None:
    tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in described.items()}
    head, offsets = build_header(tensors, {"format": "pt"})
    raw = head + bytes(sum(tensor_nbytes(*t) for t in tensors.values()))
    parsed = parse_header(raw, len(raw), "file")
    assert {n: (e.dtype, e.shape) for n, e in parsed.tensors.items()} == tensors
    assert {n: parsed.data_start + e.start for n, e in parsed.tensors.items()} == offsets
    theirs = dict(safetensors.deserialize(raw))
    assert {name: tuple(info["shape"]) for name, info in theirs.items()} == {n: t[1] for n, t in tensors.items()}


entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F7", 3, None]),
        "shape": st.one_of(shapes, st.just([-1]), st.just([True]), st.just("2"), st.just([2**70]), st.just([2.0])),
        "data_offsets": st.one_of(
            st.lists(st.integers(0, 24), min_size=2, max_size=2), st.just([0]), st.just([-4, 0]), st.just(None)
        ),
    }
)


@given(st.dictionaries(names, entry, max_size=3), st.integers(0, 40))
@example({n: {"dtype": "U8", "shape": [4], "data_offsets": [o, o + 4]} for n, o in (("a", 0), ("b", 2))}, 6)
@example({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, 8)
@example({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, 4)
def test_lying_headers_are_refused_as_the_library_does(header: dict[str, Any], size: int) -> None:
    raw = file_of(header, bytes(size))
    assert we_accept(raw) == library_accepts(raw)


@given(st.data())
def test_mutated_files_never_crash(data: st.DataObject) -> None:
    raw = bytearray(save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    raw = raw[:cut]
    assert we_accept(bytes(raw)) <= library_accepts(bytes(raw))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "truncated"),
        (struct.pack("<Q", 2**63), "claims"),
        (file_of([], b""), "not a JSON object"),
        (struct.pack("<Q", 20) + b'{"a": {}, "a": {}}  ', "stands twice"),
        (file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)), "lies about tensor 'a'"),
        (file_of({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, bytes(3)), "truncated"),
        (file_of({"__metadata__": {"a": 1}}, b""), "metadata"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "not valid JSON"),
        (file_of({"a": json.loads("[" * 60 + "]" * 60)}, b""), "nested"),
        (struct.pack("<Q", 60000) + b"[" * 60000, "not valid JSON"),
    ],
)
def test_messages_name_what_is_wrong(raw: bytes, words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        parse_header(raw, len(raw), "weights.safetensors")


def test_only_the_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"a": torch.arange(6.0)}))
    assert read_header(path, "x").tensors["a"].nbytes == 24


words = st.text(max_size=8)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@given(any_json)
def test_any_json_as_an_index_is_parsed_or_refused(value: Any) -> None:
    for raw in (json.dumps(value).encode(), json.dumps({"weight_map": value}).encode()):
        try:
            weight_map = parse_index(raw, "index")
        except ConversionError:
            continue
        assert all(isinstance(file, str) and not file.startswith(("/", "..")) for file in weight_map.values())


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "../x.safetensors", "a/../../x", "..", "a//b", "", "./x", "a\\b", 3, None]
)
def test_an_index_that_leads_elsewhere_is_refused(file: object) -> None:
    with pytest.raises(ConversionError):
        parse_index(json.dumps({"weight_map": {"a": file}}).encode(), "index")


@given(st.binary(max_size=60))
def test_any_bytes_as_json(raw: bytes) -> None:
    try:
        assert isinstance(parse_json_object(raw, "file"), dict)
    except ConversionError as error:
        assert str(error).startswith("file ")  # noqa: PT017
