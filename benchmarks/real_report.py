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
        out += [
            "", f"### {model}, {kv_heads} KV heads", "",
            "| row | seed | KV bytes/token | " + " | ".join(domains) + " | KL, mean | "
            + "".join(f"passkey {k} | " for k in keys) + "s | GPU GB |",
            "|---" * (6 + len(domains) + len(keys)) + "|",
        ]  # fmt: skip
        for r in mine:
            first = r["row"] == "source"
            cells = [f"{r['domains'][d]['loss_after']:.3f}" if first else f"{lost(r, d):+.3f}" for d in domains]
            cells.append(f"{sum(r['domains'][d]['kl'] for d in domains) / len(domains):.3f}")
            cells += [f"{r['passkey'][k]:.0%}" if k in r.get("passkey", {}) else "not run" for k in keys]
            cells += [f"{r['seconds']:.0f}", f"{r.get('gpu_gb', 0):.1f}"]
            out.append(f"| {r['row']} | {r['seed']} | {r['kv_bytes']} | " + " | ".join(cells) + " |")
    return out


def report(folder: Path) -> None:
    """Print the table, and draw the mean loss over the domains over KV bytes."""
    records = json.loads((folder / "real_models.json").read_text())
    print("\n".join(lines(records)))
    try:
        from matplotlib import pyplot
    except ImportError:
        print("\n(no figure: matplotlib is not installed)")
        return
    suit_both_grounds()
    figure, axes = pyplot.subplots(figsize=(7.0, 4.5))
    for model in dict.fromkeys(r["model"] for r in records):
        for row in dict.fromkeys(r["row"] for r in records):
            points = sorted(
                (r["kv_bytes"], sum(d["loss_after"] for d in r["domains"].values()) / len(r["domains"]))
                for r in records
                if (r["model"], r["row"]) == (model, row)
            )
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=f"{Path(model).name}: {row}")
    axes.set_xlabel("KV bytes a token")
    axes.set_ylabel("loss, mean over the domains (nats a token)")
    axes.set_yscale("log")
    axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(folder / "real_models.svg", metadata={"Date": None})
    pyplot.close(figure)
