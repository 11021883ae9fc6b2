"""A source checkpoint: its config, its tensors' headers, and one tensor at a time. No code of it is ever run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn_patch.documents.stranger_json import (
    CONFIG_BYTES,
    check_config_limits,
    parse_json_object,
    read_small,
    refuse_adapter,
)
from hf_attn_patch.errors import ConversionError

from .safetensors_header import LFS_POINTER, parse_index, read_header, refuse_lfs_pointer

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SINGLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

#: the longest index that is read, several times what the largest models have
INDEX_BYTES = 40_000_000

#: what comes along: tokenizer, generation config, chat template, processor, licence, Qwen2.5-Omni's speakers
COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".codes", ".spm")
COMPANION_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING", "spk_dict.pt")
#: what is often tied to the embeddings, and then need not be stored
TIED = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|embed_tokens|shared|decoder)\.weight$")
#: and folders: more chat templates, and sentence-transformers' modules (1_Pooling, 2_Dense, ...)
COMPANION_FOLDERS = re.compile(r"additional_chat_templates|\d+_[A-Z]\w*")
#: what a conversion writes anew or what would be wrong beside the new weights
NOT_COMPANIONS = (
    "config.json", INDEX, PICKLE_INDEX, "conversion.json", "README.md", "trainer_state.json",
    "params.json",  # the heads as Mistral's own format says them
    "hf_quant_config.json", "quantize_config.json", "quant_config.json",  # would say "quantized"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """Where a tensor is: bytes ``offset`` to ``offset + nbytes`` of file number ``file`` (a pickle has no offsets)."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: int
    offset: int


@dataclass
class Source:
    """A checkpoint folder that has been read as far as its headers."""

    folder: Path
    name: str  # as the user named it: a folder or a hub id
    revision: str | None
    config: dict[str, Any]
    files: list[Path] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    tensors: dict[str, SourceTensor] = field(default_factory=dict)
    companions: list[str] = field(default_factory=list)
    pickled: bool = False
    _open: dict[int, Any] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> Tensor:
        """One tensor, in its own dtype; the caller owns its memory."""
        import torch

        from .dtypes import torch_dtype

        info = self.tensors[name]
        if self.pickled:
            return self.pickle(info.file)[name].detach()
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        buffer = bytearray(info.nbytes)
        with open(self.files[info.file], "rb") as file:
            file.seek(info.offset)
            if file.readinto(buffer) != info.nbytes:
                raise ConversionError(f"{self.files[info.file]} changed while it was read: tensor {name!r} is cut off")
        return torch.frombuffer(buffer, dtype=torch_dtype(info.dtype)).reshape(info.shape)

    def pickle(self, file: int) -> dict[str, Tensor]:
        """The tensors of a pickled file, memory-mapped; only the last file is kept open."""
        if file not in self._open:
            self._open.clear()
            self._open[file] = load_pickle(self.files[file])
        return self._open[file]

    def close(self) -> None:
        self._open.clear()


def load_pickle(path: Path) -> dict[str, Tensor]:
    """A pickled state dict through torch's restricted unpickler: tensors and containers, nothing that runs."""
    import torch

    with open(path, "rb") as file:
        refuse_lfs_pointer(file.read(len(LFS_POINTER)), str(path))
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be memory-mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise ConversionError(f"{path} asks for more memory than there is") from None
    except Exception:  # a damaged pickle makes torch raise whatever its half-read objects happen to raise
        raise ConversionError(f"{path} is no pickle of plain tensors (truncated, or it holds other objects)") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ConversionError(f"{path} does not hold a dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise ConversionError(f"{path} holds no plain tensor under {name!r}")
        if tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():  # strides of 0 repeat what is there
            raise ConversionError(
                f"{path}: tensor {name!r} claims {tensor.nbytes:,} bytes, more than the file holds of it"
            )
    return state


def open_source(
    folder: Path, *, name: str | None = None, revision: str | None = None, allow_pickle: bool = False
) -> Source:
    """Read the config and every header of a checkpoint folder; no weights.

    Raises:
        ConversionError: something is missing, broken, leaves the folder, or is pickled without ``allow_pickle``.
    """
    if not folder.is_dir():
        if folder.suffix == ".gguf":
            raise ConversionError(
                f"{folder} is a GGUF file: hf-attn convert unpacks it with --dequantize, or give "
                "the safetensors checkpoint that it was made from"
            )
        raise ConversionError(f"{folder} is not a folder")
    config_path = inside(folder, "config.json")
    if not config_path.is_file():
        refuse_adapter(folder, weights=False)
        if any(folder.glob("*.gguf")):
            raise ConversionError(
                f"{folder} holds GGUF files: hf-attn convert unpacks one with --dequantize, or give the "
                "safetensors checkpoint that they were made from"
            )
        inner = next((p.parent for p in sorted(folder.glob("0_*/config.json"))), None)  # old sentence-transformers
        where = "" if inner is None else f"; its model lies in {inner.name}, which can be converted by itself"
        raise ConversionError(f"{folder} has no config.json{where}")
    config = parse_json_object(read_small(config_path, CONFIG_BYTES), str(config_path))
    check_config_limits(config, str(config_path))
    source = Source(folder, name or str(folder), revision, config, companions=companions_of(folder))
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        _add_safetensors(source, [SINGLE], None)
    elif (folder / INDEX).exists() or (folder / INDEX).is_symlink():
        weight_map = parse_index(read_small(inside(folder, INDEX), INDEX_BYTES), str(folder / INDEX))
        _add_safetensors(source, sorted(set(weight_map.values())), weight_map)
    elif (folder / PICKLE_SINGLE).exists() or (folder / PICKLE_INDEX).exists():
        if not allow_pickle:
            raise ConversionError(
                f"{folder} holds pickled weights ({PICKLE_SINGLE}), which can run code when loaded; "
                "save it as safetensors, or pass --allow-pickle to read it with weights_only=True"
            )
        _add_pickles(source)
    else:
        refuse_adapter(folder, weights=False)
        raise ConversionError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")
    if not source.tensors:
        raise ConversionError(f"{folder} has no tensors in its weights")
    refuse_adapter(folder, weights=True)
    return source


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, refused if it leads out of the folder.

    A hub cache keeps its files as links from ``snapshots/<revision>/`` to ``blobs/``: those are inside too.
    """
    path = folder / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in allowed):
        raise ConversionError(f"{path} leads outside the folder, to {real}; copy the file into the folder")
    return path


def _add_safetensors(source: Source, names: list[str], weight_map: dict[str, str] | None) -> None:
    for number, name in enumerate(names):
        path = inside(source.folder, name)
        if not path.is_file():
            reason = "which its index names" if weight_map else "or it is no file"
            raise ConversionError(f"{source.folder} has no {name}, {reason}")
        header = read_header(path, str(path))
        source.files.append(path)
        source.metadata.append(header.metadata)
        for tensor, entry in header.tensors.items():
            if weight_map is not None and weight_map.get(tensor, name) != name:
                continue  # the index says that another file's copy counts
            if tensor in source.tensors:
                raise ConversionError(
                    f"tensor {tensor!r} stands in two files of {source.folder}, and the index does not choose"
                )
            source.tensors[tensor] = SourceTensor(
                entry.dtype, entry.shape, entry.nbytes, number, header.data_start + entry.start
            )
    for tensor, name in (weight_map or {}).items():
        # a tied head that is named but stored nowhere is what it is tied to; whether that is so, loading will tell
        if tensor not in source.tensors and not TIED.search(tensor):
            raise ConversionError(f"tensor {tensor!r} is not in {source.folder / name}, where the index says it is")


def _add_pickles(source: Source) -> None:
    from .dtypes import format_name

    source.pickled = True
    folder, names = source.folder, [PICKLE_SINGLE]
    if not (folder / PICKLE_SINGLE).exists():
        names = sorted(
            set(parse_index(read_small(inside(folder, PICKLE_INDEX), INDEX_BYTES), str(folder / PICKLE_INDEX)).values())
        )
    for number, name in enumerate(names):
        path = inside(folder, name)
        if not path.is_file():
            raise ConversionError(f"{folder} has no {name}, which its index names")
        source.files.append(path)
        source.metadata.append({"format": "pt"})
        for tensor, value in source.pickle(number).items():
            if tensor in source.tensors:
                raise ConversionError(f"tensor {tensor!r} stands in two files of {folder}")
            nbytes = value.numel() * value.element_size()
            source.tensors[tensor] = SourceTensor(
                format_name(value.dtype, tensor), tuple(value.shape), nbytes, number, 0
            )


def companions_of(folder: Path) -> list[str]:
    """Files that belong to the model but are not its weights, config or code."""
    found = []
    for path in sorted(folder.iterdir()):
        keep = path.name.endswith(COMPANION_SUFFIXES) or path.name.startswith(COMPANION_NAMES)
        index = re.search(r"\.index(\.\w+)*\.json$", path.name)  # of weights, other variants' (index.fp32.json) too
        if path.is_file() and keep and path.name not in NOT_COMPANIONS and not index:
            found.append(str(inside(folder, path.name).relative_to(folder)))
        elif path.is_dir() and COMPANION_FOLDERS.fullmatch(path.name):
            _refuse_empty_dense(path)
            for file in sorted(path.iterdir()):
                weights = file.name == PICKLE_SINGLE or file.suffix == ".safetensors"  # copied, never loaded
                if file.is_file() and (weights or file.name.endswith(COMPANION_SUFFIXES)):
                    found.append(str(inside(folder, f"{path.name}/{file.name}").relative_to(folder)))
    return found


def _refuse_empty_dense(module: Path) -> None:
    """A linear layer of sentence-transformers whose weights are not here: pickles are fetched only when asked for."""
    config = module / "config.json"
    dense = config.is_file() and b'"in_features"' in config.read_bytes()[:CONFIG_BYTES]
    if dense and not any((module / name).is_file() for name in (SINGLE, PICKLE_SINGLE)):
        raise ConversionError(
            f"{module} has no weights ({SINGLE}); if they are pickled, pass --allow-pickle to bring them along"
        )


@contextmanager
def no_reading_errors(what: str) -> Iterator[None]:
    """Turn the operating system's refusals (permissions, I/O errors) into :class:`ConversionError`."""
    try:
        yield
    except OSError as error:
        raise ConversionError(f"{what} cannot be read: {error.strerror or error} ({error.filename or what})") from None
