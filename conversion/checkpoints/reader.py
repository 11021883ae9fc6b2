"""A source checkpoint: its config, its tensors' headers, and one tensor at a time. No code of it is ever run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn_patch.errors import ConversionError

from .safetensors_header import parse_index, parse_json_object, read_header

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SINGLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

#: what comes along: tokenizer, generation config, chat template, processor, licence
COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".spm")
COMPANION_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
#: and folders: more chat templates, and sentence-transformers' modules (1_Pooling, 2_Dense, ...)
COMPANION_FOLDERS = re.compile(r"additional_chat_templates|\d+_[A-Z]\w*")
#: what a conversion writes anew or what would be wrong beside the new weights
NOT_COMPANIONS = ("config.json", INDEX, PICKLE_INDEX, "conversion.json", "README.md", "trainer_state.json")


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
    import pickle

    import torch

    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be memory-mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, OSError):
        raise ConversionError(f"{path} is no pickle of plain tensors (truncated, or it holds other objects)") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ConversionError(f"{path} does not hold a dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise ConversionError(f"{path} holds no plain tensor under {name!r}")
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
            raise ConversionError(f"{folder} is a GGUF file; convert the safetensors checkpoint that it was made from")
        raise ConversionError(f"{folder} is not a folder")
    config_path = inside(folder, "config.json")
    if not config_path.is_file():
        if (folder / "adapter_config.json").exists():
            raise ConversionError(f"{folder} holds an adapter, not a model: merge it into its base model first")
        if any(folder.glob("*.gguf")):
            raise ConversionError(f"{folder} holds GGUF files; convert the safetensors checkpoint they were made from")
        raise ConversionError(f"{folder} has no config.json")
    config = parse_json_object(_read_small(config_path), str(config_path))
    source = Source(folder, name or str(folder), revision, config, companions=_companions(folder))
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        _add_safetensors(source, [SINGLE], None)
    elif (folder / INDEX).exists() or (folder / INDEX).is_symlink():
        weight_map = parse_index(_read_small(inside(folder, INDEX)), str(folder / INDEX))
        _add_safetensors(source, sorted(set(weight_map.values())), weight_map)
    elif (folder / PICKLE_SINGLE).exists() or (folder / PICKLE_INDEX).exists():
        if not allow_pickle:
            raise ConversionError(
                f"{folder} holds pickled weights ({PICKLE_SINGLE}), which can run code when loaded; "
                "save it as safetensors, or pass --allow-pickle to read it with weights_only=True"
            )
        _add_pickles(source)
    else:
        raise ConversionError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")
    if not source.tensors:
        raise ConversionError(f"{folder} has no tensors in its weights")
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


def _read_small(path: Path, limit: int = 200_000_000) -> bytes:
    if path.stat().st_size > limit:
        raise ConversionError(f"{path} is too large to be what its name says")
    return path.read_bytes()


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
        if tensor not in source.tensors:
            raise ConversionError(f"tensor {tensor!r} is not in {source.folder / name}, where the index says it is")


def _add_pickles(source: Source) -> None:
    from .dtypes import format_name

    source.pickled = True
    folder, names = source.folder, [PICKLE_SINGLE]
    if not (folder / PICKLE_SINGLE).exists():
        names = sorted(set(parse_index(_read_small(inside(folder, PICKLE_INDEX)), str(folder / PICKLE_INDEX)).values()))
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


def _companions(folder: Path) -> list[str]:
    """Files that belong to the model but are not its weights, config or code."""
    found = []
    for path in sorted(folder.iterdir()):
        keep = path.name.endswith(COMPANION_SUFFIXES) or path.name.startswith(COMPANION_NAMES)
        if path.is_file() and keep and path.name not in NOT_COMPANIONS and not path.name.endswith(".index.json"):
            found.append(str(inside(folder, path.name).relative_to(folder)))
        elif path.is_dir() and COMPANION_FOLDERS.fullmatch(path.name):
            for file in sorted(path.iterdir()):
                if file.is_file() and file.name.endswith((*COMPANION_SUFFIXES, ".safetensors")):
                    found.append(str(inside(folder, f"{path.name}/{file.name}").relative_to(folder)))
    return found


@contextmanager
def no_reading_errors(what: str) -> Iterator[None]:
    """Turn the operating system's refusals (permissions, I/O errors) into :class:`ConversionError`."""
    try:
        yield
    except OSError as error:
        raise ConversionError(f"{what} cannot be read: {error.strerror or error} ({error.filename or what})") from None
