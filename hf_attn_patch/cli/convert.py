"""``hf-attn convert`` and its sisters. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_attn_patch.conversion.methods.registry import AUTO, METHODS
from hf_attn_patch.documents.bars import progress_bar
from hf_attn_patch.documents.paths import user_path
from hf_attn_patch.errors import ConversionError

from .errors import user_errors
from .options import families_option, method_options

if TYPE_CHECKING:
    from hf_attn_patch.conversion.plan_data import KVHeads, Plan


def parse_kv_heads(text: str) -> KVHeads:
    """``8``; ``8,8,4,4`` (one per layer); ``10-20=4`` (layers 10 to 20); ``cross=2,self=4`` (by attention).

    >>> parse_kv_heads("8"), parse_kv_heads("8,4"), parse_kv_heads("self=4,cross=2")
    (8, [8, 4], {'self': 4, 'cross': 2})
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        if any("=" in part for part in parts):
            pairs = [part.split("=") for part in parts]
            return {name.strip(): int(number) for name, number in pairs}
        return int(parts[0]) if len(parts) == 1 else [int(part) for part in parts]
    except ValueError:
        raise ConversionError(
            f"--kv-heads {text!r} is no number of heads; write 8, or 8,8,4,4 (one per layer), or 10-20=4 (layers 10 to "
            "20), or self=4,cross=2"
        ) from None


def command_line() -> str:
    """The command as typed."""
    return shlex.join(["hf-attn", *sys.argv[1:]])


@click.command()
@click.argument("src")
@click.argument("dst", required=False)
@click.option(
    "--kv-heads",
    metavar="N",
    help="KV heads of the result: 8; 8,8,4,4 (one per layer); 10-20=4 (layers); self=4,cross=2.",
)
@click.option(
    "--kv-budget",
    type=float,
    metavar="SHARE",
    help="Instead: choose a number for each layer on the calibration text, so that this share of the KV cache is left "
    "(experimental; for architectures that can say a number for each layer).",
)
@click.option(
    "--method",
    metavar="NAME",
    help=f"{AUTO} (calibrated for causal language models and with --calibrate, otherwise aligned), "
    f"{', '.join(METHODS)}.  [default: {AUTO}]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For methods that draw numbers or text.")
@families_option
@method_options
@click.option("--dry-run", is_flag=True, help="Print what would happen, from config and headers alone.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint at DST.")
@click.option("--resume", is_flag=True, help="Go on where a killed run of the same conversion stopped.")
@click.option("--workers", type=int, default=1, show_default=True, help="Threads that convert and copy.")
@click.option("--max-shard-size", metavar="SIZE", help="Size of an output file, such as 5GB.  [default: as in SRC]")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--allow-pickle", is_flag=True, help="Read pytorch_model.bin (with weights_only=True).")
@click.option(
    "--dequantize", is_flag=True, help="Unpack a quantized SRC first: a GGUF file, FP8, MXFP4, compressed-tensors."
)
@click.option("--allow-nonfinite", is_flag=True, help="Convert weights that have NaN or Inf.")
@click.option("--with-code", is_flag=True, help="Carry the model class's code, for trust_remote_code=True.")
@click.option("--push-to-hub", metavar="REPO", help="Upload DST to this repository afterwards.")
@click.option("--private", is_flag=True, help="With --push-to-hub: a private repository.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="Print the plan first.")
@user_errors
def convert(
    src: str, dst: str | None, kv_heads: str | None, kv_budget: float | None, method: str | None, seed: int,
    dry_run: bool, as_json: bool,
    overwrite: bool, resume: bool, workers: int, max_shard_size: str | None, revision: str | None, allow_pickle: bool,
    dequantize: bool, allow_nonfinite: bool, with_code: bool, push_to_hub: str | None, private: bool, quiet: bool,
    verbose: bool, **options: Any,
) -> None:  # fmt: skip
    """Convert the checkpoint SRC (a folder or hub id) to fewer KV heads, into the new folder DST."""
    given = {name: value for name, value in options.items() if value is not None}
    _check_options(kv_heads, kv_budget, calibrated="calibrate" in given, pushed=bool(push_to_hub), private=private)
    wanted = None if kv_heads is None else parse_kv_heads(kv_heads)
    if dequantize and resume:
        raise ConversionError(
            "--resume cannot go on from a source that is unpacked anew: start again without it, or unpack SRC once "
            "(hf_attn_patch.conversion.dequantize) and convert that"
        )
    if dst is None and not dry_run:
        raise ConversionError("no destination: give a folder DST, or --dry-run to see what would happen")

    from hf_attn_patch.conversion.api import convert as run
    from hf_attn_patch.conversion.api import plan as make
    from hf_attn_patch.conversion.processes import together
    from hf_attn_patch.conversion.reports.report import plan_dict, plan_text

    with contextlib.ExitStack() as unpacked:
        with together(given.get("device")) as processes:
            quiet = quiet or not processes.main
            _check_places(src, dst, overwrite, push_to_hub)
            read, commit = unpacked.enter_context(_plain(src, dst, revision, unpack=dequantize))
            if wanted is None:
                wanted = _under_budget(read, kv_budget or 0.0, seed, commit, allow_pickle, given, quiet)
            plan = make(
                read, wanted, method=method, seed=seed, revision=commit, allow_pickle=allow_pickle,
                max_shard_size=max_shard_size, with_code=with_code, **given,
            )  # fmt: skip
            plan.source.name = src
            if dry_run:
                if processes.main:
                    click.echo(json.dumps(plan_dict(plan, workers), indent=2) if as_json else plan_text(plan, workers))
                return
            _tell_plan(plan, plan_text(plan, workers) if verbose else "", quiet)
            with progress_bar(total=plan.bytes_after, unit="B", unit_scale=True, desc="converting") as bar:
                record = run(
                    plan, dst or "", overwrite=overwrite, resume=resume, workers=workers,
                    allow_nonfinite=allow_nonfinite, command=command_line(), progress=bar.update,
                )  # fmt: skip
        if not processes.main:
            return
        if push_to_hub:
            _push(str(dst), push_to_hub, private, quiet)
        if as_json:
            click.echo(json.dumps(record, indent=2))
        elif not quiet:
            _tell(record, plan, str(dst))
        if not quiet:
            _tell_what_was_lost(plan, record, Path(dst or ""))


@contextlib.contextmanager
def _plain(src: str, dst: str | None, revision: str | None, *, unpack: bool) -> Iterator[tuple[str, str | None]]:
    """SRC and its revision, or what takes their place: a plain checkpoint beside DST, as long as the context."""
    if not unpack:
        yield src, revision
        return
    from hf_attn_patch.conversion.unpacking import dequantized

    try:
        with dequantized(src, Path(dst or "converted"), revision=revision) as folder:
            yield str(folder), None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what was unpacked is removed: begin anew") from None


def _push(dst: str, repository: str, private: bool, quiet: bool) -> None:
    from hf_attn_patch.conversion.checkpoints.hub import push

    address = push(Path(dst), repository, private=private)
    if not quiet:
        click.echo(f"pushed to {address}", err=True)


def _tell_plan(plan: Plan, text: str, quiet: bool) -> None:
    """The plan's warnings, and itself where that is asked for, on stderr."""
    if quiet:
        return
    for warning in plan.warnings:
        click.echo(f"Note: {warning}.", err=True)
    if text:
        click.echo(text, err=True)


def _check_options(
    kv_heads: str | None, kv_budget: float | None, *, calibrated: bool, pushed: bool, private: bool
) -> None:
    """What goes with what, before anything is read."""
    if kv_heads is not None and kv_budget is not None:
        raise ConversionError("--kv-heads and --kv-budget both say how many KV heads: give one of them")
    if kv_heads is None and kv_budget is None:
        raise ConversionError("say how many KV heads: --kv-heads N (or --kv-budget SHARE with --calibrate TEXT)")
    if private and not pushed:
        raise ConversionError("--private is about the repository of --push-to-hub, which is missing")
    if kv_budget is not None and not calibrated:
        raise ConversionError("--kv-budget chooses by errors on a calibration text: give --calibrate TEXT")


def _check_places(src: str, dst: str | None, overwrite: bool, repository: str | None) -> None:
    """Where the result shall go, before any work."""
    from hf_attn_patch.conversion.checkpoints.hub import check_repo_id
    from hf_attn_patch.conversion.checkpoints.writer import check_apart, check_destination

    if repository:
        check_repo_id(repository)
    if dst is not None:
        if user_path(src).exists():
            check_apart(user_path(src), user_path(dst))
        check_destination(user_path(dst), overwrite)


def _tell(record: dict[str, Any], plan: Plan, dst: str) -> None:
    """What was written, in a line."""
    from hf_attn_patch.conversion.checkpoints.sizes import human

    for note in (record["details"] or {}).get("notes", ()):
        click.echo(f"Note: {note}.", err=True)
    click.echo(f"{dst}: {human(plan.bytes_after)} in {len(plan.shards)} file(s), method {plan.method.name}")


def _tell_what_was_lost(plan: Any, record: dict[str, Any], dst: Path) -> None:
    """The loss before and after on held-out text, on stderr; a warning last where it is much."""
    from hf_attn_patch.conversion.reports.held_out import measure, told, warning

    found = (record["details"] or {}).get("held_out")
    if found is None:
        try:
            found = measure(plan, dst)
        except ConversionError as error:
            click.echo(f"Note: what was lost is not measured: {error}.", err=True)
    if found is None:
        return
    click.echo(told(found), err=True)
    if text := warning(found, plan.method.name):
        click.echo(f"Warning: {text}.", err=True)


def _under_budget(
    src: str, budget: float, seed: int, revision: str | None, allow_pickle: bool, given: dict[str, Any], quiet: bool
) -> list[int]:
    from hf_attn_patch.conversion.budget import describe, kv_heads_under_budget

    names = ("calibrate", "calibration_tokens", "calibration_length", "group", "device")
    known = {name: given[name] for name in names if name in given}
    numbers = kv_heads_under_budget(src, budget, seed=seed, revision=revision, allow_pickle=allow_pickle, **known)
    if not quiet:
        click.echo(f"Note: {describe(numbers, budget)}.", err=True)
    return numbers


@click.command()
@click.argument("src")
@click.option(
    "--context", type=click.IntRange(min=1), help="Tokens to size the cache for  (default 8192, or what SRC can read)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@families_option
@click.option(
    "--plot", "picture", metavar="PNG", help="Draw the KV cache over the context for each number of KV heads."
)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--allow-pickle", is_flag=True, help="Read pytorch_model.bin (with weights_only=True).")
@user_errors
def inspect(
    src: str, context: int | None, as_json: bool, picture: str | None, revision: str | None, allow_pickle: bool
) -> None:
    """Heads and KV bytes per token of SRC, and what each number of KV heads would save."""
    from hf_attn_patch.conversion.checkpoints.hub import resolve
    from hf_attn_patch.conversion.reports.inspection import inspect_source, inspection_text

    facts = inspect_source(resolve(src, revision=revision, allow_pickle=allow_pickle), context)
    if picture:
        from hf_attn_patch.conversion.reports.plots import plot_cache

        plot_cache(facts, picture)
    click.echo(json.dumps(facts, indent=2) if as_json else inspection_text(facts))


@click.command()
@click.argument("src")
@click.argument("dst")
@families_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--allow-pickle", is_flag=True, help="Read pytorch_model.bin (with weights_only=True).")
@click.option("--dequantize", is_flag=True, help="Unpack SRC first, as convert --dequantize did.")
@user_errors
def verify(src: str, dst: str, as_json: bool, revision: str | None, allow_pickle: bool, dequantize: bool) -> None:
    """Compute the conversion of SRC again and compare it with DST: exit code 0 if it is the same, 1 if not."""
    from hf_attn_patch.conversion.reports.verification import verification_dict
    from hf_attn_patch.conversion.reports.verification import verify as run

    with _plain(src, dst, revision, unpack=dequantize) as (read, commit):
        found = run(read, dst, revision=commit, allow_pickle=allow_pickle)
    if as_json:
        click.echo(json.dumps(verification_dict(found), indent=2))
    else:
        for line in found.differences:
            click.echo(line)
        if found.not_recomputed:
            click.echo(
                f"not computed again (they depend on a calibration text): {len(found.not_recomputed)} merged tensors; "
                "checked: their shapes, that they are finite, that SRC has the heads they were made from"
            )
        if found.rounded:
            click.echo(f"equal up to rounding: {len(found.rounded)} merged tensors")
        verdict = "is" if found.ok else "is NOT"
        click.echo(f"{dst} {verdict} the conversion of {src} ({found.copied} tensors copied, {found.merged} merged)")
    if not found.ok:
        sys.exit(1)
