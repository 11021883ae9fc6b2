"""What this folder stands on: the versions that its functions are known for, and the error where that changed."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from importlib import metadata
from typing import ParamSpec, TypeVar

from hf_attn_patch.errors import AttentionError

P = ParamSpec("P")
R = TypeVar("R")

#: package -> the oldest version that is asked for and the newest that was tested: pyproject.toml and
#: requirements/tested.txt say the same (tests/compat/test_ground.py)
TESTED = {
    "transformers": ("5.17", "5.24"),
    "torch": ("2.11", "2.13"),
    "triton": ("3.6", "3.7"),
    "accelerate": ("1.10", "1.15"),
    "safetensors": ("0.5", "0.8"),
    "huggingface_hub": ("1.0", "2.4"),
    "peft": ("0.17", "0.21"),
    "datasets": ("3.0", "5.2"),
    "python": ("3.10", "3.14"),
}


class CompatError(AttentionError):
    """Another package is not as the tested versions are; the message names what changed and the way out."""


def installed_version(package: str) -> str:
    """The installed version of a package, as it says itself.

    >>> installed_version("no-such-package")
    'not installed'
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def way_out(package: str) -> str:
    """What to install.

    >>> way_out("transformers")
    'pip install "transformers>=5.17,<5.25"'
    """
    first, last = TESTED[package]
    major, minor = last.split(".")
    return f'pip install "{package}>={first},<{major}.{int(minor) + 1}"'


def newer_than_tested(package: str, version: str) -> bool:
    """Whether a version's first two numbers are above the newest that was tested; False for packages that have none.

    >>> newer_than_tested("transformers", "5.24.3"), newer_than_tested("transformers", "5.25.0.dev0")
    (False, True)
    >>> newer_than_tested("torch", "2.2.0+cu121"), newer_than_tested("torch", "10.0")
    (False, True)
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if package not in TESTED or numbers is None:
        return False
    return (int(numbers[1]), int(numbers[2])) > tuple(int(n) for n in TESTED[package][1].split("."))


def changed(package: str, what: str) -> CompatError:
    """The error for ``what`` of ``package``, which is not as the tested versions have it."""
    first, last = TESTED[package]
    return CompatError(
        f"{what} of {package} {installed_version(package)} is not as hf_attn_patch knows it, from {package} {first} to "
        f"{last}; install one of those ({way_out(package)}) or a newer hf_attn_patch"
    )


def known(package: str, what: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a function that reads or changes ``what`` of a package; names that are gone there end in a CompatError.

    Args:
        package: a key of :data:`TESTED`.
        what: the private thing, named as a user would find it ("PreTrainedConfig._attn_implementation").
    """
    assert package in TESTED

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except (AttributeError, ImportError, KeyError) as error:
                raise changed(package, what) from error

        guarded.known = (package, what)  # type: ignore[attr-defined]
        return guarded

    return mark
