"""SRC as the user names it: a folder, or a model on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hf_attn_patch.documents.paths import user_path
from hf_attn_patch.errors import ConversionError, one_line

from .reader import COMPANION_NAMES, COMPANION_SUFFIXES, PICKLE_SINGLE, Source, no_reading_errors, open_source

_REPO_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def resolve(src: str | os.PathLike[str], *, revision: str | None = None, allow_pickle: bool = False) -> Source:
    """Open ``src``: a folder, or else a hub id (its files are fetched into the usual cache).

    Raises:
        ConversionError: there is no such folder or model, or it is broken.
    """
    text = os.fspath(src)
    folder = user_path(text)
    if folder.exists():
        if revision is not None:
            raise ConversionError(f"--revision belongs to a hub id, but {text} is a folder")
        with no_reading_errors(text):
            return open_source(folder, name=text, allow_pickle=allow_pickle)
    pickles = (PICKLE_SINGLE.replace(".bin", "*.bin"), f"[1-9]_*/{PICKLE_SINGLE}") if allow_pickle else ()
    snapshot = fetched(text, revision, more=pickles)
    commit = snapshot.name if snapshot.parent.name == "snapshots" else None
    with no_reading_errors(text):
        return open_source(snapshot, name=text, revision=commit, allow_pickle=allow_pickle)


def fetched(repo_id: str, revision: str | None = None, *, more: tuple[str, ...] = ()) -> Path:
    """The folder of a hub id's files, fetched into the usual cache.

    Args:
        more: patterns of files to fetch beside weights in safetensors and what belongs to them.

    Raises:
        ConversionError: there is no such model, or it cannot be reached.
    """
    if _REPO_ID.fullmatch(repo_id) is None or repo_id.count("/") > 1:
        raise ConversionError(f"{repo_id} is no folder")
    return _download(repo_id, revision, more)


def _download(repo_id: str, revision: str | None, more: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download

    patterns = [
        "*.safetensors",
        *(f"*{suffix}" for suffix in COMPANION_SUFFIXES),
        *(f"{n}*" for n in COMPANION_NAMES),
        "README.md",
    ]
    patterns.extend(more)
    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["consolidated*", "original/*", "onnx/*"],
            )
        )
    except errors.HFValidationError:
        raise ConversionError(f"{repo_id} is neither a folder nor a valid hub id") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        reasons: list[tuple[type[Exception], str]] = [
            (errors.GatedRepoError, "it is gated: ask for access on its page and log in with `hf auth login`"),
            (errors.RepositoryNotFoundError, "no such model, or it is private"),
            (errors.RevisionNotFoundError, f"it has no revision {revision!r}"),
            (errors.LocalEntryNotFoundError, "the hub cannot be reached, and it is not in the cache"),
        ]
        reason = next((text for kind, text in reasons if isinstance(error, kind)), one_line(error))
        raise ConversionError(f"{repo_id} is neither a folder nor can it be fetched from the hub: {reason}") from None


def check_repo_id(repo_id: str) -> None:
    """Refuse before any work what the hub would refuse after it.

    Raises:
        ConversionError: ``repo_id`` is no name of a repository.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConversionError(f"--push-to-hub {repo_id}: {one_line(error)}") from None


def push(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a converted checkpoint; returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload converted checkpoint")
        return str(url)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ConversionError(
            f"{folder} is converted, but could not be pushed to {repo_id}: {one_line(error)}"
        ) from None
