"""The table and the figure of ``real_models.py``, from what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.plot_style import suit_both_grounds


def lost(record: dict[str, Any], domain: str) -> float:
    """Nats a token over the source."""
    found = record["domains"][domain]
    return float(found["loss_after"] - found["loss_before"])


def lines(records: list[dict[str, Any]]) -> list[str]:
    """A markdown table for each model and number of KV heads."""
    out = []
    for model, kv_heads in dict.fromkeys((r["model"], r["kv_heads"]) for r in records):
        mine = [r for r in records if (r["model"], r["kv_heads"]) == (model, kv_heads)]
        domains = list(mine[0]["domains"])
        keys = list(dict.fromkeys(k for r in mine for k in r.get("passkey", {})))
        tasks = next((list(r["tasks"]) for r in mine if "tasks" in r), [])
        out += [
            "", f"### {model}, {kv_heads} KV heads", "",
            "| row | seed | KV bytes/token | " + " | ".join(domains) + " | KL, mean | "
            + "".join(f"passkey {k} | " for k in keys) + "s | GPU GB |"
            + "".join(f" {t} |" for t in tasks),
            "|---" * (6 + len(domains) + len(keys) + len(tasks)) + "|",
        ]  # fmt: skip
        for r in mine:
            first = r["row"] == "source"
            cells = [f"{r['domains'][d]['loss_after']:.3f}" if first else f"{lost(r, d):+.3f}" for d in domains]
            cells.append(f"{sum(r['domains'][d]['kl'] for d in domains) / len(domains):.3f}")
            cells += [f"{r['passkey'][k]:.0%}" if k in r.get("passkey", {}) else "not run" for k in keys]
            cells += [f"{r['seconds']:.0f}", f"{r.get('gpu_gb', 0):.1f}"]
            if tasks:
                cells += [f"{r['tasks'][t]:.1%}" if "tasks" in r else "not run" for t in tasks]
            out.append(f"| {r['row']} | {r['seed']} | {r['kv_bytes']} | " + " | ".join(cells) + " |")
    return out


#: rows of the figure, and what they are called there
SHOWN = {
    "mean": "mean (the GQA paper)", "procrustes": "Procrustes, no training", "svd": "SVD of keys and values",
    "merged, own": "merged by 4,096 own tokens (no GPU)", "default": "no text given, a minute on a GPU",
    "wide": "2M tokens of fifteen domains, 72 s", "wide + KD 20M": "that + 20M tokens of distillation",
}  # fmt: skip


#: all of them readable on white and on dark
COLOURS = ("#3b8bc4", "#e07b39", "#3aa35a", "#d6504f", "#9a78d0", "#b08040", "#d568b5")


def mean_loss(record: dict[str, Any]) -> float:
    """Nats a token, the mean over the domains."""
    return sum(float(d["loss_after"]) for d in record["domains"].values()) / len(record["domains"])


def figure(records: list[dict[str, Any]]) -> Any:
    """Loss over KV bytes a token: from each source a line to every way of having fewer, the first seed's."""
    from matplotlib import pyplot

    suit_both_grounds()
    drawn, axes = pyplot.subplots(figsize=(7.5, 5.2))
    axes.set_prop_cycle(color=COLOURS)
    for model in dict.fromkeys(r["model"] for r in records):
        mine = [r for r in records if r["model"] == model]
        source = next((r for r in mine if r["row"] == "source"), None)
        known = [source] if source else []
        for row, label in SHOWN.items():
            found = [*known, *(r for r in mine if r["row"] == row)]
            points = {r["kv_bytes"]: mean_loss(r) for r in reversed(found)}
            if len(points) > len(known):
                (line,) = axes.plot(*zip(*sorted(points.items()), strict=True), "o-", linewidth=1.2, markersize=4)
                least = min(points)
                said = f"{label} ({points[least]:.2f})"
                beside = {"textcoords": "offset points", "ha": "right", "va": "center", "fontsize": 6.5}
                axes.annotate(said, (least, points[least]), (-8, 0), color=line.get_color(), **beside)
        if source:
            axes.annotate(f"{Path(model).name} ({mean_loss(source):.2f})", (source["kv_bytes"], mean_loss(source)),
                          (0, -12), textcoords="offset points", ha="right", fontsize=7)  # fmt: skip
    axes.set_xscale("log", base=2)
    bytes_ = sorted({r["kv_bytes"] for r in records})
    axes.set_xticks(bytes_, [f"{n:,}" for n in bytes_])
    axes.minorticks_off()
    axes.set_xlim(bytes_[0] / 6, bytes_[-1] * 1.15)  # room for the words
    axes.set_xlabel("bytes of KV cache a token")
    axes.set_ylabel("loss, mean of the domains (nats a token)")
    axes.set_yscale("log")
    ticks = [3, 4, 5, 6, 8, 10]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_ylim(2.7 if axes.get_ylim()[0] > 2 else None, None)
    drawn.tight_layout()
    return drawn


def report(folder: Path) -> None:
    """Print the table, and draw the figure, from ``real_models.json``."""
    records = json.loads((folder / "real_models.json").read_text())
    print("\n".join(lines(records)))
    try:
        drawn = figure(records)
    except ImportError:
        print("\n(no figure: matplotlib is not installed)")
        return
    drawn.savefig(folder / "real_models.svg", metadata={"Date": None})
