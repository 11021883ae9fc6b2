"""Rows of other packages: found by the entry points that those declare, or named on the command line.

A package that knows a family declares it in its pyproject.toml, and from then on every command and function knows it::

    [project.entry-points."hf_attn_patch.families"]
    newmodel = "newmodel.hf_attn_patch:FAMILY"

What an entry point names is a :class:`~.family.Family`, several in a list, a function that gives either, or a module
that calls :func:`~.table.register` when it is imported. ``--register`` takes a module or a .py file of that kind.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from hf_attn_patch.documents.paths import user_path
from hf_attn_patch.errors import ConversionError, one_line

from .family import Family

GROUP = "hf_attn_patch.families"

Register = Callable[[Family], None]


@functools.cache
def add_entry_points(register: Register) -> None:
    """Register what installed packages declare, once. A broken one is told by a warning and does no other harm."""
    for point in entry_points(group=GROUP):
        try:
            _add(point.load(), register, point.value)
        except Exception as error:  # whatever somebody else's module raises
            package = point.dist.name if point.dist else "an installed package"
            warnings.warn(
                f"the families of {package} ({GROUP}: {point.name} = {point.value}) are not known here, because that "
                f"raises {type(error).__name__}: {one_line(error)}",
                stacklevel=2,
            )


def add_module(name: str, register: Register) -> None:
    """Import a module, or run a .py file, whose rows shall be known.

    Raises:
        ConversionError: there is none, or it raises.
    """
    path = user_path(name)
    try:
        if path.suffix == ".py":
            if not path.is_file():
                raise ConversionError(f"--register {name}: there is no such file")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(name)
        families = getattr(module, "FAMILIES", None)
        if families is not None:
            _add(families, register, name)
    except ConversionError:
        raise
    except Exception as error:  # whatever somebody else's module raises
        raise ConversionError(f"--register {name} raises {type(error).__name__}: {one_line(error)}") from error


def _add(value: Any, register: Register, where: str) -> None:
    """Register what an entry point gives."""
    if callable(value) and not isinstance(value, Family):
        value = value()
    if value is None or isinstance(value, ModuleType):
        return  # it called register itself
    for family in [value] if isinstance(value, Family) or not isinstance(value, Iterable) else value:
        if not isinstance(family, Family):
            raise TypeError(f"{where} gives {family!r}, which is no Family")
        register(family)
