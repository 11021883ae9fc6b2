"""The figures of ``hf-attn inspect --plot`` and ``hf-attn evaluate --plot``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_attn_patch.conversion.checkpoints.sizes import human
from hf_attn_patch.errors import ConversionError


@contextmanager
def figure(file: str | Path) -> Iterator[Any]:
    """Axes to draw on; written to ``file`` at the end.

    Raises:
        ConversionError: matplotlib is missing, or ``file`` is no picture's name or cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConversionError("--plot needs matplotlib: pip install 'hf-attn-patch[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(6.4, 4.2))
    try:
        yield axis
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        try:
            fig.savefig(file, dpi=150, bbox_inches="tight")
        except (ValueError, OSError) as error:
            raise ConversionError(f"--plot {file}: {error}") from None
    finally:
        plt.close(fig)


def _bytes(axis: Any) -> None:
    """Label an axis in kB, MB, GB."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    axis.set_minor_formatter(NullFormatter())


def _legend(axis: Any) -> None:
    """Beside the picture, where it hides nothing."""
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def plot_cache(facts: Mapping[str, Any], file: str | Path) -> None:
    """Bytes of the KV cache over the context, a line for each number of KV heads that the model could have.

    Args:
        facts: from :func:`~hf_attn_patch.conversion.reports.inspection.inspect_source`.
        file: a picture's name, such as ``cache.png``.

    Raises:
        ConversionError: see :func:`figure`; or the model caches nothing.
    """
    now, context = facts["kv_bytes_at_context"], facts["context"]
    if not now:
        raise ConversionError(f"--plot: {facts['source']} has no KV cache (it is an encoder)")
    with figure(file) as axis:
        for choice in facts["choices"]:
            sizes, n = choice["kv_bytes_over_context"], choice["kv_heads"]
            name = f"{n} KV head{'s' if n > 1 else ''}{', now' if sizes[-1] == now else ''}"
            tokens = [context * i // (len(sizes) - 1) for i in range(len(sizes))]
            axis.plot(tokens, sizes, linewidth=2, label=f"{name}: {human(sizes[-1])}")
        axis.set(xlim=(0, context), xlabel="context, tokens", ylabel="KV cache of one sequence")
        axis.set_ylim(bottom=0)
        axis.set_title(f"{Path(facts['source']).name}: {human(now)} at {context:,} tokens", fontsize=10)
        _bytes(axis.yaxis)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        _legend(axis)


def plot_quality(found: Sequence[Any], file: str | Path) -> None:
    """Loss over KV bytes per token, a point for each model.

    Args:
        found: :class:`~hf_attn_patch.conversion.reports.evaluation.Evaluation` of each.

    Raises:
        ConversionError: see :func:`figure`.
    """
    from matplotlib.ticker import FixedLocator

    with figure(file) as axis:
        for e in found:
            axis.plot([e.kv_bytes_per_token], [e.loss], "o", markersize=8, label=Path(e.model).name)
        sizes = sorted({e.kv_bytes_per_token for e in found})
        axis.set(xlabel="KV cache per token", ylabel="loss, nats per token")
        if sizes[0] > 0:
            axis.set_xscale("log", base=2)
            axis.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
        axis.xaxis.set_major_locator(FixedLocator(sizes))
        _bytes(axis.xaxis)
        _legend(axis)
