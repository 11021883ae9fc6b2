"""The safetensors header and index, parsed without trust.

The library refuses broken headers too, but tells neither byte offsets (needed to stream a tensor of any size) nor
which tensor is at fault. Format: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_attn_patch.documents.stranger_json import parse_json_object
from hf_attn_patch.errors import ConversionError

#: a header of 100,000 tensors, more than any one file has, takes about 10 MB; safetensors' own limit of 100 MB would
#: let a stranger's file ask for gigabytes of Python objects
MAX_HEADER_BYTES = 16_000_000

#: how the text begins that git without git-lfs leaves in the place of a large file
LFS_POINTER = b"version "

#: torch's own limit
MAX_DIMENSIONS = 64

#: bits of one element, by the format's names
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: ``start`` and ``end`` count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says that it holds; ``data_start`` is where its first tensor's bytes may begin."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this dtype and shape.

    >>> tensor_nbytes("BF16", (2, 3))
    12
    """
    return (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8


def refuse_lfs_pointer(raw: bytes, what: str) -> None:
    """Name such a text as what it is.

    Raises:
        ConversionError: ``raw``, the first bytes of a file, begin like one.
    """
    if raw.startswith(LFS_POINTER):
        raise ConversionError(f"{what} is a git-LFS pointer, not the file itself: run `git lfs pull` in its folder")


def parse_header(raw: bytes, file_size: int, what: str) -> Header:
    """Check the first bytes of a safetensors file of ``file_size`` bytes against the whole format.

    Args:
        raw: at least the 8 bytes of the header's length and the header itself.
        file_size: bytes of the whole file.
        what: how messages name the file.

    Raises:
        ConversionError: the file is truncated or its header does not describe it.
    """
    refuse_lfs_pointer(raw, what)
    if len(raw) < 8:
        raise ConversionError(f"{what} is truncated: {file_size} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", raw[:8])
    if length > MAX_HEADER_BYTES or 8 + length > file_size:
        raise ConversionError(
            f"{what} is truncated or no safetensors file: its header claims {length} bytes of a file of {file_size}"
        )
    header = parse_json_object(raw[8 : 8 + length], f"the header of {what}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ConversionError(f"the header of {what} has metadata that is not text")
    data_start = 8 + length
    tensors = {name: _entry(name, value, what) for name, value in header.items()}
    _check_tiling(tensors, file_size - data_start, what)
    return Header(tensors, metadata, data_start)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(name: str, value: object, what: str) -> TensorEntry:
    if not isinstance(value, dict):
        raise ConversionError(f"the header of {what} describes tensor {name!r} by a {type(value).__name__}")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ConversionError(f"tensor {name!r} of {what} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise ConversionError(f"tensor {name!r} of {what} has the impossible shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ConversionError(f"tensor {name!r} of {what} has the impossible data_offsets {str(offsets)[:80]}")
    entry = TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])
    if entry.nbytes != tensor_nbytes(dtype, entry.shape):
        raise ConversionError(
            f"the header of {what} lies about tensor {name!r}: {dtype} of shape {list(shape)} takes "
            f"{tensor_nbytes(dtype, entry.shape)} bytes, its data_offsets span {entry.nbytes}"
        )
    return entry


def _check_tiling(tensors: Mapping[str, TensorEntry], data_bytes: int, what: str) -> None:
    """The tensors must cover the data without a hole or an overlap, as the format demands."""
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            kind = "overlaps another tensor" if entry.start < position else "leaves a hole before it"
            raise ConversionError(f"the header of {what} lies about tensor {name!r}: it {kind}")
        position = entry.end
    if position != data_bytes:
        raise ConversionError(
            f"{what} is truncated or its header lies: its tensors take {position} bytes, the file has {data_bytes}"
        )


def read_header(path: str | os.PathLike[str], what: str) -> Header:
    """:func:`parse_header` of a file, reading nothing but the header."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        raw = file.read(8)
        if len(raw) == 8:
            raw += file.read(min(struct.unpack("<Q", raw)[0], MAX_HEADER_BYTES, size))
    return parse_header(raw, size, what)


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header of a file that will hold ``tensors`` (name -> dtype, shape) in this order.

    Returns:
        The bytes to write first (padded, so that data starts at a multiple of 8), and each tensor's offset in the file.
    """
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position, offsets = 0, {}
    for name, (dtype, shape) in tensors.items():
        end = position + tensor_nbytes(dtype, shape)
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        offsets[name] = position
        position = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}


def parse_index(raw: bytes, what: str) -> dict[str, str]:
    """The ``weight_map`` (tensor -> file name) of a sharded checkpoint's index.

    Raises:
        ConversionError: it is no index, or a file name is a path that could lead elsewhere.
    """
    weight_map = parse_json_object(raw, what).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{what} has no weight_map of tensors to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or "\0" in file:
            raise ConversionError(f"{what} gives no file name for tensor {name!r} but {file!r}")
        if os.path.isabs(file) or "\\" in file or os.path.normpath(file) != file or file.startswith(".."):
            raise ConversionError(f"{what} points outside the folder for tensor {name!r}: {file!r}")
    return weight_map
