"""``hf-attn env``: versions, devices, and which backends can run here and why the others can't."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from typing import Any

import click

PACKAGES = (
    "hf-attn-patch",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "triton",
    "flash-attn-4",
    "flash-attn",
    "flash-attn-3",
    "xformers",
    "peft",
    "datasets",
)


def environment() -> dict[str, Any]:
    """What a bug report needs: {'python', 'platform', 'packages', 'newer_than_tested', 'devices', 'backends',
    'never_tuned'}."""
    import torch

    from hf_attn_patch.attn.backends.registry import backend, names
    from hf_attn_patch.compat.ground import TESTED, newer_than_tested

    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    devices = [f"CPU: {platform.machine()}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append(
            f"cuda:{i}: {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB, "
            f"CUDA {torch.version.cuda}"
        )
    backends = {name: backend(name).missing() for name in names()}
    from hf_attn_patch.attn.crossovers import never_tuned

    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": packages,
        "newer_than_tested": {
            name: TESTED[name][1] for name, version in packages.items() if version and newer_than_tested(name, version)
        },
        "devices": devices,
        "backends": backends,
        "never_tuned": never_tuned(),
    }


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Show versions, devices and the backends that can run here.

    Paste the output into a bug report.
    """
    found = environment()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"Python {found['python']} on {found['platform']}")
    for line in found["devices"]:
        click.echo(f"  {line}")
    click.echo("\nPackages")
    width = max(map(len, found["packages"]))
    newer = found["newer_than_tested"]
    for name, version in found["packages"].items():
        tested = f"  (newer than {newer[name]}, the newest that was tested)" if name in newer else ""
        click.echo(f"  {name:<{width}} {version or 'not installed'}{tested}")
    click.echo("\nBackends")
    for name, missing in found["backends"].items():
        click.echo(f"  {name:<{width}} {'can run here' if missing is None else missing}")
    if found["never_tuned"]:
        click.echo(f"\nThe ladder is {found['never_tuned']}.")
    if newer:
        from hf_attn_patch.compat.ground import way_out

        ways = ", ".join(way_out(name) for name in newer)
        click.echo(f"\nWarning: {', '.join(newer)}: newer than what was tested. If something fails: {ways}", err=True)
