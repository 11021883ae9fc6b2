"""The folder that a run writes: one run at a time, and nothing of another run is replaced unasked."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hf_attn_patch.errors import TrainingError
from hf_attn_patch.training.options import UptrainOptions

from .checkpoints import list_checkpoints, remove_leftovers

BEST, CHECKPOINTS = "best", "checkpoints"


@contextmanager
def claimed_output(options: UptrainOptions) -> Iterator[Path]:
    """``options.output``, made if it is not there, for the time of the block; of several processes the first asks.

    Raises:
        TrainingError: it can't be written (also later, within the block), another run is writing it, or it holds what
            may not be replaced.
    """
    folder = Path(options.output)
    with _one_sentence(folder):
        if int(os.environ.get("RANK", "0")):
            yield folder
            return
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainingError(f"another run is writing to --output {folder} at this moment") from None
            except OSError:  # a file system without locks
                pass
            _make_room(folder, options)
            yield folder
        finally:
            os.close(handle)


def _make_room(folder: Path, options: UptrainOptions) -> None:
    """Leave only what ``options`` go on with.

    Raises:
        TrainingError: there is more, and nobody said that it may go.
    """
    places = {name: folder / name for name in (CHECKPOINTS, BEST, "config.json")}
    for source in filter(None, (options.model, options.teacher, options.dataset, options.eval_dataset)):
        path = Path(os.path.expanduser(source)).resolve()
        if path == folder.resolve() or any(p.resolve() in (path, *path.parents) for p in places.values()):
            raise TrainingError(f"--output {folder} would be written over {source}, which is read; give another folder")
    remove_leftovers(places[CHECKPOINTS], options.keep)
    checkpoints = list_checkpoints(places[CHECKPOINTS])
    finished = places["config.json"].exists()
    if options.resume and (checkpoints or not finished):  # without both it was killed before its first checkpoint
        return
    found = [name for name, place in places.items() if (checkpoints if name == CHECKPOINTS else place.exists())]
    if found and not options.overwrite:
        ways = ["--resume true to go on with it"] * bool(checkpoints) + ["--overwrite true to replace it"]
        raise TrainingError(
            f"--output {folder} holds another run ({', '.join(found)}): give another folder, or {', or '.join(ways)}"
        )
    for place in places.values():
        if place.is_dir():
            shutil.rmtree(place)
    for path in [places["config.json"], *folder.glob("*.safetensors*")]:
        path.unlink(missing_ok=True)


@contextmanager
def _one_sentence(folder: Path) -> Iterator[None]:
    """What the operating system, torch or safetensors say when ``folder`` can't be written, as a TrainingError."""
    cause: Exception
    try:
        yield
        return
    except OSError as error:
        if error.filename and folder.resolve() not in (p := Path(error.filename).resolve(), *p.parents):
            raise
        cause, reason = error, error.strerror or str(error)
    except SafetensorError as error:
        if "while serializing" not in str(error):
            raise
        cause, reason = error, str(error)
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        cause, reason = error, "torch has not got all of a file to the disk"
    raise TrainingError(
        f"--output {folder} can't be written: {reason}; once it can, --resume true goes on from the last checkpoint, "
        "if there is one"
    ) from cause
