"""``hf-attn push-kernel``: the decode kernel as a repository for the package ``kernels``."""

from __future__ import annotations

from pathlib import Path

import click

from hf_attn_patch.errors import AttentionError

from .errors import user_errors


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--repo", help="Push it to this repository of the hub, OWNER/NAME.")
@click.option("--private", is_flag=True, help="With --repo: create a private repository.")
@user_errors
def push_kernel(folder: Path, repo: str | None, private: bool) -> None:
    """Write the decode kernel to FOLDER as a repository for the package kernels, and push it where --repo says.

    Models then load it by attn_implementation="OWNER/NAME", without this package.
    """
    from hf_attn_patch.hf import kernel_repository

    if private and not repo:
        raise AttentionError("--private is about the repository that --repo names, which is missing")
    files = kernel_repository.write_kernel(folder, repo or "OWNER/NAME")
    click.echo(f"{len(files)} files in {folder}")
    if repo:
        click.echo(kernel_repository.push_kernel(folder, repo, private=private))
