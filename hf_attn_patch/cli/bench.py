"""``hf-attn bench``: times of the backends on this machine, and the ladder tuned to its GPU."""

from __future__ import annotations

import json

import click

from hf_attn_patch.errors import AttentionError

from .errors import user_errors


@click.command()
@click.option("--tune", is_flag=True, help="Measure where backends cross on this GPU and keep it for the ladder.")
@click.option("--dry-run", is_flag=True, help="With --tune: show the numbers, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@user_errors
def command(tune: bool, dry_run: bool, as_json: bool) -> None:
    """Time the attention backends of this machine, or tune the ladder to its GPU."""
    import torch

    from hf_attn_patch.attn.tuning import SHAPES, TINY, times

    if tune:
        _tune(dry_run, as_json)
        return
    lines = times(SHAPES if torch.cuda.is_available() else TINY)
    if as_json:
        click.echo(json.dumps(lines, indent=2))
        return
    last = None
    for line in lines:
        if line["shape"] != last:
            last = line["shape"]
            click.echo("B {}, {} query and {} KV heads, {} queries, {} keys, head_dim {}, causal".format(*last))
        click.echo(f"  {line['backend']:<14} " + (f"{line['us']:10.1f} us" if "us" in line else line["reason"]))


def _tune(dry_run: bool, as_json: bool) -> None:
    import torch

    from hf_attn_patch.attn import crossovers as numbers
    from hf_attn_patch.attn.backends import flash4, triton_decode
    from hf_attn_patch.attn.plan import forget
    from hf_attn_patch.attn.tuning import seconds, tuned

    if not torch.cuda.is_available():
        raise AttentionError("there is nothing to tune without a GPU: on a CPU one kernel takes all calls")
    if missing := triton_decode.missing():
        raise AttentionError(f"there is nothing to tune here: {missing}")
    rival = "torch_sdpa" if flash4.missing() else "flash4"
    gpu = torch.cuda.get_device_name()
    path = numbers.tuning_file(gpu)
    found = tuned(seconds, rival)
    if not dry_run:
        numbers.write(path, gpu, found)
        forget()
    result = {"gpu": gpu, "against": rival, "file": None if dry_run else str(path), **vars(found)}
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        shipped = getattr(numbers.SHIPPED, name, None)
        click.echo(f"{name:<16} {value}" + ("" if shipped is None else f" (shipped: {shipped})"))
