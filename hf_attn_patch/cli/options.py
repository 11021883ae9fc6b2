"""Options that several commands have, and those that methods bring."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from hf_attn_patch.conversion.methods.registry import METHODS, all_options
from hf_attn_patch.errors import ConversionError


def method_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """A click option for every option of any method."""
    for option in reversed(all_options().values()):
        owners = ", ".join(method.name for method in METHODS.values() if option in method.options)
        flag = f"--{option.name.replace('_', '-')}"
        text = f"{option.help} [{owners}]"
        if option.type is bool:
            declare = click.option(f"{flag}/--no-{flag[2:]}", default=None, help=text)
        else:
            declare = click.option(flag, type=option.type, default=None, help=text)
        function = declare(function)
    return function


def families_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--register``: rows of families for this run."""

    def add(_context: click.Context, _parameter: click.Parameter, modules: tuple[str, ...]) -> None:
        if not modules:
            return
        from hf_attn_patch.conversion.families.plugins import add_module
        from hf_attn_patch.conversion.families.table import register

        try:
            for module in modules:
                add_module(module, register)
        except ConversionError as error:
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
            sys.exit(2)

    return click.option(
        "--register",
        "modules",
        metavar="MODULE",
        multiple=True,
        expose_value=False,
        callback=add,
        help="A module or .py file that describes further families; may be given several times. Installed packages "
        "declare theirs as entry points (hf_attn_patch.families).",
    )(function)
