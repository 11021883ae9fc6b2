"""``hf-attn evaluate``. Nothing heavy is imported before it runs."""

from __future__ import annotations

import json

import click

from .errors import user_errors


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--text", required=True, metavar="FILE", help="Text, or JSONL with a field 'text'.")
@click.option("--source", metavar="SRC", help="The model that KL and top-1 agreement are measured to; a row too.")
@click.option(
    "--context", type=click.IntRange(min=2), default=1024, show_default=True,
    help="Tokens of a window, and before the tokens whose decoding is timed.",
)  # fmt: skip
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="Tokens from window to window; the context for disjoint windows.  [default: half the context]",
)
@click.option("--tokens", type=click.IntRange(min=2), help="Tokens of the text at most.")
@click.option("--speed/--no-speed", default=True, help="Time decoding.")
@click.option("--lm-eval", metavar="TASKS", help="Also run these tasks of lm-evaluation-harness: names, or YAML files.")
@click.option("--device", help="Such as cuda or cpu.  [default: a GPU if there is one]")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True,
    help="Of the weights.",
)  # fmt: skip
@click.option("--attn-implementation", "attention", help="[default: hf_attn_patch, or eager where a family needs it]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--plot", "picture", metavar="PNG", help="Draw loss over KV bytes per token.")
@user_errors
def evaluate(
    models: tuple[str, ...], text: str, source: str | None, context: int, stride: int | None, tokens: int | None,
    speed: bool, lm_eval: str | None, device: str | None, dtype: str, attention: str | None, as_json: bool,
    picture: str | None,
) -> None:  # fmt: skip
    """Loss, perplexity, KL to SRC, KV bytes and speed of causal language models on a text."""
    from hf_attn_patch.conversion.reports.evaluation import evaluate as run
    from hf_attn_patch.conversion.reports.evaluation import evaluation_dict, evaluation_text
    from hf_attn_patch.conversion.reports.plots import plot_quality

    found = run(
        list(models), text, source=source, context=context, stride=stride, tokens=tokens, speed=speed,
        lm_eval=lm_eval, device=device, dtype=dtype, attention=attention,
    )  # fmt: skip
    if picture:
        plot_quality(found, picture)
    click.echo(json.dumps(evaluation_dict(found), indent=2) if as_json else evaluation_text(found))
