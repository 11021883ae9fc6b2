"""Checkpoints that are there whole or not at all, and plain models.

Everything is written into a folder with another name, flushed to disk and renamed: a kill at any moment leaves the
last complete checkpoint in place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_attn_patch.errors import TrainingError, one_line
from hf_attn_patch.training.data.stream import Position

STATE = "trainer_state.json"
PREFIX = "step-"


@dataclass
class Progress:
    """All of a run that is neither weights nor optimiser nor RNG.

    Args:
        settings: what must not change between a run and its continuation.
        layout: of the checkpoint that holds this (see ``layout_of``).
    """

    step: int = 0
    tokens: int = 0
    position: Position = field(default_factory=Position)
    best: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    layout: str = "whole"

    def to_json(self) -> str:
        return json.dumps({**self.__dict__, "position": self.position.as_dict()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Progress:
        fields = json.loads(text)
        return cls(**{**fields, "position": Position(**fields["position"])})

    def require_same_settings(self, settings: dict[str, Any]) -> None:
        """Refuse to continue a run as another one.

        Raises:
            TrainingError: a setting that shapes the result differs.
        """
        changed = [k for k, v in self.settings.items() if settings.get(k) != v]
        if changed:
            named = ", ".join(f"{k} ({self.settings[k]!r} then, {settings.get(k)!r} now)" for k in changed)
            raise TrainingError(
                f"--resume continues a run as it was, but this differs: {named}; give the same options, or another "
                "--output"
            )


@contextmanager
def written_aside(target: Path, accelerator: Any = None) -> Iterator[Path]:
    """A new folder to write into, which becomes ``target`` when the block ends well; what was there goes.

    With an ``accelerator``, all processes enter together and the main one renames.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with written_aside(Path(folder, "a")) as aside:
    ...         _ = (aside / "x").write_text("1")
    ...     sorted(p.name for p in Path(folder).rglob("*"))
    ['a', 'x']
    """
    main = accelerator is None or accelerator.is_main_process
    aside = target.with_name(f".{target.name}.incomplete")
    if main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    _wait(accelerator)
    try:
        yield aside
    except BaseException:
        if main:  # the room that it takes may be what was missing
            shutil.rmtree(aside, ignore_errors=True)
        raise
    _wait(accelerator)
    if main:
        for path in aside.rglob("*"):
            _flush(path)
        _flush(aside)
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        aside.rename(target)
        _flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    _wait(accelerator)


def save_checkpoint(accelerator: Any, folder: Path, progress: Progress, keep: int = 1) -> Path:
    """Weights, optimiser, RNG and ``progress`` into ``folder/step-N``; older ones beyond ``keep`` are removed."""
    target = folder / f"{PREFIX}{progress.step:08d}"
    progress.layout = layout_of(accelerator)
    with written_aside(target, accelerator) as aside:
        accelerator.save_state(str(aside))
        if accelerator.is_main_process:
            (aside / STATE).write_text(progress.to_json())
    if accelerator.is_main_process:
        remove_leftovers(folder, keep)
    return target


def remove_leftovers(folder: Path, keep: int) -> None:
    """All but the newest ``keep`` checkpoints, and what a kill has left half-written or half-removed."""
    kept = list_checkpoints(folder)[-keep:]
    for path in [*folder.glob(f"{PREFIX}*"), *folder.glob(f".{PREFIX}*")]:
        if path not in kept:
            (path / STATE).unlink(missing_ok=True)  # first, so that half of it is no checkpoint
            shutil.rmtree(path)


def layout_of(accelerator: Any) -> str:
    """How a checkpoint's weights and optimiser lie on the disk, which says who can read it."""
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        return f"DeepSpeed's of {accelerator.num_processes} processes"
    return "FSDP2's" if kind == "FSDP" else "whole"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, the oldest first."""
    return sorted(p for p in folder.glob(f"{PREFIX}*") if (p / STATE).is_file())


def load_checkpoint(accelerator: Any, folder: Path, settings: dict[str, Any]) -> Progress | None:
    """Put the newest checkpoint of ``folder`` into the prepared objects; None if there is none.

    Raises:
        TrainingError: it belongs to a run with other settings, was written in another way, or is damaged.
    """
    found = list_checkpoints(folder)
    if not found:
        return None
    try:
        progress = Progress.from_json((found[-1] / STATE).read_text())
        progress.require_same_settings(settings)
        if progress.layout != (layout := layout_of(accelerator)):
            raise TrainingError(
                f"the checkpoint {found[-1].name} is {progress.layout}, and this run's are {layout}: --resume with the "
                "accelerate config and the number of processes that it was started with, or give another --output"
            )
        accelerator.load_state(str(found[-1]))
        accelerator.step = 0  # a checkpoint lies between two steps; its counter is of other micro-batches, maybe
    except TrainingError:
        raise
    except Exception as error:  # of json, torch, safetensors or the operating system
        before = f"goes on from {found[-2].name}" if len(found) > 1 else "starts anew"
        raise TrainingError(
            f"{found[-1]} can't be loaded ({type(error).__name__}: {one_line(error)}); without that "
            f"folder, --resume {before}"
        ) from error
    return progress


def replace_files(source: Path, target: Path) -> None:
    """Move every file of ``source`` into ``target``, the config last: a folder with a config is complete."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda p: p.name == "config.json"):
        os.replace(path, target / path.name)
    source.rmdir()


def save_model(folder: Path, model: Any, *, extras: Callable[[Path], None], among: bool = False) -> None:
    """A plain model that ``from_pretrained`` reads, put in place only when it is complete.

    Args:
        extras: writes what stands beside the weights (tokenizer, model card).
        among: the folder holds other things, which stay; else it becomes what was written.
    """
    target = folder / ".model" if among else folder
    with written_aside(target) as aside:
        model.save_pretrained(aside)
        extras(aside)
    if among:
        replace_files(target, folder)


def _wait(accelerator: Any) -> None:
    if accelerator is not None:
        accelerator.wait_for_everyone()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
