"""The table and the figure of ``quality.py``, from its ``quality.json``."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.plot_style import GREY, suit_both_grounds

Key = tuple[int, str]  # KV heads, method


def spread(values: Iterable[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def best_recipe(records: Iterable[dict[str, Any]]) -> str:
    """Of uptrained models, the recipe that is best on average over those numbers of KV heads that all were run with."""
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for r in records:
        losses[r["recipe"]][r["kv_heads"]] = r["loss"]
    common = set.intersection(*(set(x) for x in losses.values()))
    if not common:  # nothing to compare by: the recipe that was run most
        return max(losses, key=lambda recipe: len(losses[recipe]))
    return min(losses, key=lambda recipe: statistics.mean(losses[recipe][n] for n in common))


def chosen(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without those of recipes that were not chosen; the choice is made on the first seed alone.

    One recipe for each method, loss and share, whatever the number of KV heads.
    """
    first = min((r["seed"] for r in records), default=0)
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for r in records:
        if r["kind"] == "uptrained" and r["seed"] == first:
            kinds[r["method"], r["distil"], r["share"]].append(r)
    best = {kind: best_recipe(found) for kind, found in kinds.items()}
    return [
        r
        for r in records
        if r["kind"] != "uptrained" or best.get((r["method"], r["distil"], r["share"])) == r["recipe"]
    ]


Column = tuple[bool | None, float]


def column_of(record: dict[str, Any]) -> Column:
    """(distilled, share) of a record; untrained is (None, 0)."""
    return (None, 0.0) if record["kind"] == "untrained" else (record["distil"], record["share"])


def title(column: Column) -> str:
    return "untrained" if column[0] is None else f"{column[1]:.0%} {'KD' if column[0] else 'CE'}"


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a row for each number of KV heads and method, a column for each way of uptraining.

    A cell is the mean over seeds and its standard deviation. In brackets the recovery, (L_mean,0 - L) / (L_mean,0 -
    L_MHA): 100% is the original's loss, 0% that of untrained mean-pooling to as many KV heads, whatever the method.
    """
    base = {r["seed"]: r["loss"] for r in records if r["kind"] == "base"}
    lines = [f"MHA: {spread(base.values())} nats a token, {len(base)} seed{'s' if len(base) > 1 else ''}", ""]
    worst = {
        (r["seed"], r["kv_heads"]): r["loss"] for r in records if r["kind"] == "untrained" and r["method"] == "mean"
    }
    shown = [r for r in chosen(records) if r["kind"] != "base"]
    cells: dict[tuple[Key, Column], list[dict[str, Any]]] = defaultdict(list)
    for r in shown:
        cells[(r["kv_heads"], r["method"]), column_of(r)].append(r)
    wanted = sorted({column_of(r) for r in shown}, key=lambda c: (c[1], bool(c[0])))
    lines += ["| KV heads | method | " + " | ".join(map(title, wanted)) + " | seconds | GB |"]
    lines += ["|---" * (len(wanted) + 4) + "|"]
    for key in sorted(dict.fromkeys(k for k, _ in cells), key=lambda k: -k[0]):
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
        conversions = cells.get((key, (None, 0.0)), [])
        seconds = f"{statistics.median(r['seconds'] for r in conversions):.1f}" if conversions else ""
        peak = f"{max(r['peak_gpu_bytes'] for r in conversions) / 1e9:.2f}" if conversions else ""
        name = "MHA, trained on" if key[1] == "none" else key[1]
        lines.append(f"| {key[0]} | {name} | " + " | ".join(row) + f" | {seconds} | {peak} |")
    return "\n".join([*lines, *choices(records)])


def choices(records: list[dict[str, Any]]) -> list[str]:
    """What was tried and chosen on the first seed, below the table."""
    first = min((r["seed"] for r in records), default=0)
    tried = [r for r in records if r["kind"] == "uptrained" and r["seed"] == first]
    kept = {(r["method"], column_of(r), r["recipe"]) for r in chosen(tried)}
    lines = []
    for method, column in dict.fromkeys((r["method"], column_of(r)) for r in tried):
        texts: dict[str, list[str]] = defaultdict(list)
        for r in tried:
            if (r["method"], column_of(r)) == (method, column):
                texts[r["recipe"]].append(f"{r['kv_heads']}: {r['loss']:.3f}")
        if len(texts) > 1:
            parts = [
                f"{'**' + n + '**' if (method, column, n) in kept else n} ({', '.join(t)})" for n, t in texts.items()
            ]
            lines.append(f"- {method}, {title(column)}: " + "; ".join(parts))
    return ["", f"Recipes, chosen on seed {first} (KV heads: loss):", "", *lines] if lines else []


def figure(records: list[dict[str, Any]], file: Path) -> None:
    """Held-out loss over the share of the tokens, mean over seeds; one panel for each number of KV heads."""
    import matplotlib.pyplot as plt

    suit_both_grounds()

    base = statistics.mean(r["loss"] for r in records if r["kind"] == "base")
    curves: dict[tuple[int, str, bool], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in chosen(records):
        if r["kind"] == "untrained":
            for distil in (False, True):
                curves[r["kv_heads"], r["method"], distil][0.0].append(r["loss"])
        elif r["kind"] == "uptrained" and r["method"] != "none":
            curves[r["kv_heads"], r["method"], r["distil"]][r["share"]].append(r["loss"])
    panels = sorted({n for n, _, _ in curves}, reverse=True)
    if not panels:
        return
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4.2), sharey=True, squeeze=False)
    methods = list(dict.fromkeys(m for _, m, _ in curves))
    for axis, n in zip(axes[0], panels, strict=True):
        for i, method in enumerate(methods):
            for distil in (True, False):
                points = curves.get((n, method, distil), {})
                trained = len(points) > 1
                if not points or (not trained and (not distil or len(curves.get((n, method, False), {})) > 1)):
                    continue
                shares = sorted(points)
                means = [statistics.mean(points[s]) for s in shares]
                errors = [statistics.stdev(points[s]) if len(points[s]) > 1 else 0.0 for s in shares]
                label = method + ((", KD" if distil else ", CE") if trained else "")
                axis.errorbar(
                    [100 * s for s in shares], means, errors, fmt="o-" if distil else "s--", color=f"C{i}", label=label,
                    capsize=2, markersize=4,
                )  # fmt: skip
        axis.axhline(base, color=GREY, linestyle=":", linewidth=1, label="multi-head original")
        axis.set(
            title=f"{n} KV head{'s' if n > 1 else ''}", xlabel="uptraining, % of the pretraining tokens", yscale="log"
        )
        axis.grid()
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
    try:
        figure(records, out / "quality.png")
    except ImportError as error:
        print(f"no figure: {error} (pip install matplotlib; then --report)")
