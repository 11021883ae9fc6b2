"""The command ``hf-attn``. Each subcommand imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import click

#: subcommand -> (module, attribute): looked up only when it is asked for, so that `--help` imports no torch
COMMANDS: dict[str, tuple[str, str]] = {
    "bench": ("hf_attn_patch.cli.bench", "command"),
    "env": ("hf_attn_patch.cli.env", "command"),
    "convert": ("hf_attn_patch.cli.convert", "convert"),
    "evaluate": ("hf_attn_patch.cli.evaluate", "evaluate"),
    "inspect": ("hf_attn_patch.cli.convert", "inspect"),
    "push-kernel": ("hf_attn_patch.cli.kernel", "push_kernel"),
    "verify": ("hf_attn_patch.cli.convert", "verify"),
}

#: the order in `hf-attn --help`; a command that is in no section comes last, under "Other commands"
SECTIONS: dict[str, tuple[str, ...]] = {
    "Look": ("inspect", "env", "bench"),
    "Convert": ("convert",),
    "Check": ("verify", "evaluate"),
    "Publish": ("push-kernel",),
}

#: what `hf-attn COMMAND --help` ends with
EXAMPLES: dict[str, tuple[str, ...]] = {
    "bench": ("hf-attn bench", "hf-attn bench --tune"),
    "env": ("hf-attn env", "hf-attn env --json > env.json"),
    "inspect": ("hf-attn inspect meta-llama/Llama-2-7b-hf", "hf-attn inspect ./my-model --context 32768 --json"),
    "convert": (
        "hf-attn convert meta-llama/Llama-2-7b-hf --kv-heads 8 --dry-run",
        "hf-attn convert meta-llama/Llama-2-7b-hf llama-2-7b-gqa8 --kv-heads 8",
        "hf-attn convert meta-llama/Llama-2-7b-hf llama-2-7b-gqa8 --kv-heads 8 --calibrate text.txt",
        "hf-attn convert google-t5/t5-small t5-small-gqa --kv-heads cross=2,decoder=4",
    ),
    "evaluate": (
        "hf-attn evaluate llama-2-7b-gqa8 --source meta-llama/Llama-2-7b-hf --text held-out.txt",
        "hf-attn evaluate llama-2-7b-gqa8 llama-2-7b-gqa4 --text held-out.txt --plot quality.png",
    ),
    "push-kernel": ("hf-attn push-kernel kernel", "hf-attn push-kernel kernel --repo OWNER/NAME"),
    "verify": ("hf-attn verify meta-llama/Llama-2-7b-hf llama-2-7b-gqa8",),
}

EXIT_CODES = (
    "Exit codes: 0 done, 1 verify found a difference, 2 an error of usage or input, 130 interrupted, 143 terminated."
)


@contextlib.contextmanager
def terminated() -> Iterator[list[int]]:
    """Meanwhile SIGTERM, by which machines ask a job to end, does what Ctrl-C does; a second one ends it at once.

    Of several processes it goes on killing: their launcher ends those that wait for one that is gone.

    Yields:
        the signals that came.
    """
    came: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    alone = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield came
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class LazyGroup(click.Group):
    """A click group whose commands are imported when they are named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name]
        command: Any = getattr(importlib.import_module(module), attribute)
        if name in EXAMPLES:
            command.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[name])
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            # click looks for a near name among the commands it has loaded, and here it has loaded none
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(sorted(COMMANDS))}."
            ctx.fail(f"No such command {name!r}. {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with terminated() as signals:
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            resumed = "the conversion goes on where it stopped with --resume" * (ctx.invoked_subcommand == "convert")
            way_on = str(error) or resumed
            if os.environ.get("RANK", "0") == "0":  # of several processes, all of which are interrupted
                click.echo(f"Interrupted{way_on and f'; {way_on}'}.", err=True)
            ctx.exit(128 + (signals or [signal.SIGINT])[0])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        placed = {name for names in SECTIONS.values() for name in names}
        others = tuple(name for name in sorted(COMMANDS) if name not in placed)
        for title, names in {**SECTIONS, "Other commands": others}.items():
            commands = [(name, self.get_command(ctx, name)) for name in names if name in COMMANDS]
            if commands:
                with formatter.section(title):
                    formatter.write_dl(
                        [(name, command.get_short_help_str(90)) for name, command in commands if command]
                    )


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)
@click.version_option(package_name="hf-attn-patch")
def main() -> None:
    """Run, convert and uptrain Hugging Face models with as few KV heads as you choose."""
