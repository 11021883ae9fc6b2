"""Quantized checkpoints as plain ones: GGUF files, and what transformers unpacks on a CPU (FP8, MXFP4, ...).

transformers loads the checkpoint with its weights unpacked; what it holds then is written as a checkpoint without a
quantization_config, which is what a conversion reads. No code of the checkpoint is run.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_attn_patch.documents.paths import user_path
from hf_attn_patch.errors import ConversionError, one_line

from .checkpoints.hub import fetched
from .checkpoints.reader import companions_of, inside
from .checkpoints.writer import check_space
from .processes import current

#: what GGUF files are unpacked to: their weights have fewer bits than this has
GGUF_DTYPE = "bfloat16"
#: formats that transformers unpacks while it loads, on any device
WHILE_LOADING = ("fp8", "mxfp4", "compressed-tensors", "metal")
#: formats whose loaded model can be unpacked, where their package runs
AFTERWARDS = ("bitsandbytes", "higgs")
#: what transformers up to 5.20 leaves of compressed-tensors beside weights that it has unpacked
LEFT_OVER = re.compile(r"\.(weight|input|output|q|k|v)_(scale|zero_point|global_scale|g_idx|shape)$")


@contextmanager
def dequantized(src: str | os.PathLike[str], beside: Path, *, revision: str | None = None) -> Iterator[Path]:
    """A plain checkpoint of ``src`` in a folder that is there as long as the context.

    Args:
        src: a GGUF file, a folder with one or with a quantized checkpoint, or a hub id.
        beside: where the result of the conversion will stand; the folder is made next to it, on the same disk.

    Raises:
        ConversionError: it is not quantized, or cannot be unpacked here.
    """
    processes = current()
    if not processes.main:
        yield Path(processes.everybody(None)[0])
        return
    parent = user_path(beside).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{beside.name}.plain-"
    remove_left(parent, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as folder, _locked(Path(folder)):
        dequantize(src, folder, revision=revision)
        processes.everybody(folder)
        yield Path(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Meanwhile the folder is locked, which says that a process is at work in it; yields whether that could be done."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError:  # another process is, or its file system knows no locks
        locked = False
    try:
        yield locked
    finally:
        os.close(descriptor)


def remove_left(parent: Path, prefix: str) -> None:
    """Remove the unpacked checkpoints that killed runs of the same user left; they are as large as models are."""
    for folder in sorted(parent.glob(f"{glob.escape(prefix)}*")):
        if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.geteuid():
            continue
        with _locked(folder) as unused:
            if unused:
                shutil.rmtree(folder, ignore_errors=True)


def dequantize(src: str | os.PathLike[str], dst: str | os.PathLike[str], *, revision: str | None = None) -> None:
    """Write the quantized checkpoint ``src`` as a plain one to the folder ``dst``, which is empty or new.

    GGUF files become bf16, with the tokenizer that they hold; others keep the dtype that their config names.

    Raises:
        ConversionError: as :func:`dequantized`.
    """
    folder, gguf = _source(src, revision)
    target = user_path(dst)
    if target.exists() and any(target.iterdir()):
        raise ConversionError(f"{target} is not empty")
    target.mkdir(parents=True, exist_ok=True)
    model = _loaded(folder, gguf)
    _write(model, target)
    if gguf is None:
        for name in companions_of(folder):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(folder, name), target / name)
    else:
        _write_tokenizer(folder, gguf, target)


def _source(src: str | os.PathLike[str], revision: str | None) -> tuple[Path, str | None]:
    """The folder of a checkpoint, and the name of the GGUF file in it that is meant."""
    path = user_path(src)
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(4)
        if start != b"GGUF":
            raise ConversionError(f"{path} is no GGUF file; give a folder, a hub id or a .gguf file")
        return path.absolute().parent, path.name
    folder = path if path.is_dir() else fetched(os.fspath(src), revision, more=("*.gguf",))
    files = sorted(p.name for p in folder.glob("*.gguf"))
    if (folder / "config.json").is_file():
        return folder, None
    if len(files) != 1:
        found = (
            f"{len(files)} GGUF files ({', '.join(files[:4])})" if files else "neither a config.json nor a GGUF file"
        )
        raise ConversionError(f"{folder} holds {found}; name one file")
    return folder, files[0]


def _loaded(folder: Path, gguf: str | None) -> Any:
    """The model on the CPU with plain weights."""
    import transformers
    from transformers import AutoConfig

    from .loadcheck import model_class_of, quiet

    where = folder / (gguf or "config.json")
    options: dict[str, Any] = {"trust_remote_code": False}
    method = "gguf"
    if gguf is None:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        method, options["quantization_config"] = _unpacking(raw, where)
        options["dtype"] = "auto"
    else:
        if find_spec("gguf") is None:
            raise ConversionError(f"{where}: reading GGUF files needs the package gguf: pip install gguf")
        options |= {"gguf_file": gguf, "dtype": GGUF_DTYPE, "quantization_config": _gguf_config()}
    options = {key: value for key, value in options.items() if value is not None}
    with quiet():
        try:
            known = {"gguf_file": gguf} if gguf else {}
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **known)
            model_class = model_class_of(config.to_dict(), config) or (
                transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
            )
            if hasattr(model_class, "config_class") and model_class.config_class is not None:
                options.pop("trust_remote_code")
            model = model_class.from_pretrained(folder, **options)
            if method in AFTERWARDS:
                model = model.dequantize()
        except Exception as error:  # whatever the many formats' packages and devices refuse it with
            raise ConversionError(f"{where} ({method}) cannot be unpacked here: {one_line(error)}") from None
    for name, parameter in model.named_parameters():
        if LEFT_OVER.search(name):
            continue
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            stays = str(parameter.dtype).removeprefix("torch.")
            raise ConversionError(
                f"{where} ({method}) cannot be unpacked here: {name} stays {stays}; convert the unquantized checkpoint"
            )
    return model


def _unpacking(raw: dict[str, Any], where: Path) -> tuple[str, Any]:
    """The name of a checkpoint's format, and the config that asks transformers to unpack it."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    how = raw.get("quantization_config") or raw.get("compression_config")
    if not how:
        raise ConversionError(f"{where} describes no quantized checkpoint: leave --dequantize out")
    method = str(how.get("quant_method") if isinstance(how, dict) else None)
    if method == "None":
        raise ConversionError(f"{where} does not say how its weights are quantized; convert the unquantized checkpoint")
    if method not in (*WHILE_LOADING, *AFTERWARDS):
        raise ConversionError(
            f"{where} names the format {method}, and transformers cannot unpack that on a CPU "
            f"(it unpacks {', '.join(('GGUF', *WHILE_LOADING, *AFTERWARDS))}); convert the unquantized checkpoint"
        )
    if method in AFTERWARDS:
        return method, None  # as the checkpoint says
    try:
        return method, AutoQuantizationConfig.from_dict({**how, "dequantize": True})
    except Exception as error:  # the formats' classes check their options by exceptions of their own
        raise ConversionError(f"{where} has no valid quantization_config: {one_line(error)}") from None


def _gguf_config() -> Any:
    """What asks for plain weights; versions of transformers without it unpack GGUF files anyway."""
    import transformers

    config_class = getattr(transformers, "GgufConfig", None)
    return None if config_class is None else config_class(dequantize=True)


def _write(model: Any, target: Path) -> None:
    """Save a model's tensors from one that never was quantized."""
    import torch

    from .families.layer_config import config_object
    from .loadcheck import quiet

    told = model.config.to_dict().items()
    raw = {k: v for k, v in told if k != "quantization_config" and not k.startswith("_")}  # "_": how it was loaded
    dtype = next(model.parameters()).dtype
    check_space(target, sum(p.nbytes for p in model.parameters()))
    with quiet():
        with torch.device("meta"):
            plain = type(model)(config_object(raw))
        state = {name: tensor for name, tensor in model.state_dict().items() if not LEFT_OVER.search(name)}
        missing, unknown = plain.load_state_dict(state, strict=False, assign=True)
        plain.tie_weights()
        left = [name for name in missing if plain.get_parameter(name).is_meta]
        if left or unknown:
            raise ConversionError(
                f"{type(model).__name__} unpacked lacks {', '.join(left[:3])}"
                if left
                else f"{type(model).__name__} unpacked has {', '.join(unknown[:3])}, which the plain model has not"
            )
        plain.config.dtype = dtype
        plain.generation_config = model.generation_config
        plain.save_pretrained(target)


def _write_tokenizer(folder: Path, gguf: str, target: Path) -> None:
    from transformers import AutoTokenizer

    from .loadcheck import quiet

    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)
        except Exception as error:  # a tokenizer that transformers has no converter for
            text = one_line(error)
            warnings.warn(
                f"{folder / gguf}: transformers cannot read its tokenizer ({type(error).__name__}: {text}), so the "
                "result has none: put the tokenizer's files beside it",
                stacklevel=3,
            )
            return
        tokenizer.save_pretrained(target)
