"""The table and the figure of ``quality.py``, from its ``quality.json``."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Key = tuple[int, str]  # KV heads, method


def spread(values: Iterable[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def columns(records: list[dict[str, Any]]) -> list[tuple[str, bool | None, float]]:
    """(recipe, distilled, share) of every column; the first is untrained."""
    found = {(r["recipe"], r["distil"], r["share"]) for r in records if r["kind"] == "uptrained"}
    return [("", None, 0.0), *sorted(found, key=lambda c: (c[0], c[1], c[2]))]


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row for each number of KV heads and method, a column for each way of uptraining.

    In brackets the recovery, (L_mean,0 - L) / (L_mean,0 - L_MHA): 100% is the original's loss, 0% that of untrained
    mean-pooling to as many KV heads, whatever the method.
    """
    base = {r["seed"]: r["loss"] for r in records if r["kind"] == "base"}
    lines = [f"MHA: {spread(base.values())} nats a token, {len(base)} seeds", ""]
    worst = {
        (r["seed"], r["kv_heads"]): r["loss"] for r in records if r["kind"] == "untrained" and r["method"] == "mean"
    }
    cells: dict[tuple[Key, tuple[str, bool | None, float]], list[dict[str, Any]]] = defaultdict(list)
    for r in records:
        if r["kind"] != "base":
            column = ("", None, 0.0) if r["kind"] == "untrained" else (r["recipe"], r["distil"], r["share"])
            cells[(r["kv_heads"], r["method"]), column].append(r)
    wanted = columns(records)
    titles = [
        "untrained" if c[1] is None else f"{c[2]:.0%} {'KD' if c[1] else 'CE'}{' ' + c[0] if c[0] else ''}"
        for c in wanted
    ]
    lines += ["| KV heads | method | " + " | ".join(titles) + " | seconds | GB |"]
    lines += ["|---" * (len(titles) + 4) + "|"]
    keys = list(dict.fromkeys(k for k, _ in cells))
    for key in sorted(keys, key=lambda k: -k[0]):
        row = []
        for column in wanted:
            found = cells.get((key, column), [])
            text = spread(r["loss"] for r in found)
            shares = [
                (worst[r["seed"], key[0]] - r["loss"]) / (worst[r["seed"], key[0]] - base[r["seed"]])
                for r in found
                if (r["seed"], key[0]) in worst and r["seed"] in base
            ]
            row.append(text + (f" ({statistics.mean(shares):.1%})" if shares else ""))
        conversions = cells.get((key, wanted[0]), [])
        seconds = spread(r["seconds"] for r in conversions)
        peak = f"{max(r['peak_gpu_bytes'] for r in conversions) / 1e9:.2f}" if conversions else ""
        lines.append(f"| {key[0]} | {key[1]} | " + " | ".join(row) + f" | {seconds} | {peak} |")
    return "\n".join(lines)


def figure(records: list[dict[str, Any]], file: Path) -> None:
    """Held-out loss over the share of the tokens, one panel for each number of KV heads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = statistics.mean(r["loss"] for r in records if r["kind"] == "base")
    curves: dict[Key, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in records:
        if r["kind"] == "untrained":
            curves[r["kv_heads"], r["method"]][0.0].append(r["loss"])
        elif r["kind"] == "uptrained" and r["method"] != "none":
            curves[r["kv_heads"], r["method"]][r["share"]].append(r["loss"])
    panels = sorted({n for n, _ in curves}, reverse=True)
    if not panels:
        return
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.2), sharey=True, squeeze=False)
    methods = sorted({m for _, m in curves})
    for axis, n in zip(axes[0], panels, strict=True):
        for i, method in enumerate(methods):
            points = curves.get((n, method))
            if not points:
                continue
            shares = sorted(points)
            # of several ways to uptrain with the same share, the best by its mean over seeds is not known here:
            # the lowest mean over what was run
            axis.plot([100 * s for s in shares], [min(points[s]) for s in shares], "o-", color=f"C{i}", label=method)
        axis.axhline(base, color="black", linestyle="--", linewidth=1, label="multi-head original")
        axis.set(
            title=f"{n} KV head{'s' if n > 1 else ''}", xlabel="uptraining, % of the pretraining tokens", yscale="log"
        )
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("held-out loss, nats a token")
    axes[0][-1].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(file, dpi=150)
    plt.close(fig)


def report(out: Path) -> None:
    """Print the table; write ``quality.md`` and ``quality.png`` beside the JSON."""
    records = json.loads((out / "quality.json").read_text())["records"]
    text = table(records)
    print(text)
    (out / "quality.md").write_text(text + "\n")
    figure(records, out / "quality.png")
