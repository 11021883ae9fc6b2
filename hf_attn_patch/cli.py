"""The command ``hf-attn``. Each subcommand imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import importlib
from typing import Any

import click

#: subcommand -> (module, attribute): looked up only when it is asked for, so that `--help` imports no torch
COMMANDS: dict[str, tuple[str, str]] = {
    "env": ("hf_attn_patch.env", "command"),
    "convert": ("hf_attn_patch.conversion.commands", "convert"),
    "inspect": ("hf_attn_patch.conversion.commands", "inspect"),
    "verify": ("hf_attn_patch.conversion.commands", "verify"),
}


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name]
        command: Any = getattr(importlib.import_module(module), attribute)
        return command  # type: ignore[no-any-return]


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hf-attn-patch")
def main() -> None:
    """Run, convert and uptrain Hugging Face models with as few KV heads as you choose."""
