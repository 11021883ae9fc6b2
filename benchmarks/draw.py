"""Draw what models.py, claims.py and kernels.py measured.

python benchmarks/draw.py results/models.json results/claims.json      # -> results/models.svg, results/claims.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

if __name__ == "__main__":  # see benchmarks/__init__.py
    sys.path[0] = str(Path(__file__).parents[1])
from benchmarks.plot_style import GREY, suit_both_grounds

OURS = "hf_attn_patch"
COLOURS = {"sdpa": "#8c8c8c", "eager": "#adadad", "flash_attention_4": "#5b7fa6", "flex_attention": "#84a3c4"}
MINE = ("#e07b39", "#b3401c")  # as it is; with GrowingCache or unpadded()


def colour(implementation: str) -> str:
    return COLOURS.get(implementation, MINE["+" in implementation])


def caption(result: dict[str, Any]) -> str:
    env = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return f"{env['date'][:10]}, {env['device']}, {versions}"


def models(result: dict[str, Any]) -> Any:
    """One panel a line of work and number of KV heads: tokens a second, the machine's limit dashed."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if "seconds" in row:
            groups.setdefault(f"{row['work']}\n{row['kv_heads']} KV heads", []).append(row)
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 2.4 * lines), squeeze=False)
    for ax in axes.flat[len(groups) :]:
        ax.set_visible(False)
    for ax, (title, rows) in zip(axes.flat, groups.items(), strict=False):
        names, speeds = [r["implementation"] for r in rows], [r["tokens_per_second"] for r in rows]
        bars = ax.barh(names, speeds, color=[colour(name) for name in names])
        ax.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=3, fontsize=7)
        ax.axvline(rows[0]["tokens_per_second"] / rows[0]["share_of_limit"], linestyle="--", color=GREY, linewidth=0.8)
        ax.set_title(title, fontsize=9)
        ax.tick_params(labelsize=7)
        ax.locator_params(axis="x", nbins=4)
        ax.invert_yaxis()
        ax.margins(x=0.15)
    figure.suptitle("Tokens a second (dashed: what memory or arithmetic allows)", fontsize=11)
    return figure


def claims(result: dict[str, Any]) -> Any:
    """Time and memory against the length, both axes logarithmic; the KV cache and a decoding step by KV heads."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7))
    for ax, key, factor, label in (
        (axes[0, 0], "training_seconds", 1e3, "forward + backward, ms"),
        (axes[0, 1], "training_bytes", 2**-20, "peak memory, MiB"),
    ):
        for name in ("standard", OURS):
            rows = [r for r in result["attention"] if r["implementation"] == name and r[key]]
            if rows:
                style = {"color": MINE[1] if name == OURS else COLOURS["sdpa"], "marker": "o", "label": name}
                ax.loglog([r["points"] for r in rows], [r[key] * factor for r in rows], **style)
                ax.legend()
        ax.set_xlabel("points")
        ax.set_ylabel(label)
    for ax, key, factor, label in (
        (axes[1, 0], "kv_bytes", 2**-20, "KV cache, MiB"),
        (axes[1, 1], "step_seconds", 1e6, "one decoding step, microseconds"),
    ):
        longest = max(r["points"] for r in result["sharing"])
        rows = [r for r in result["sharing"] if r["points"] == longest]
        bars = ax.bar([r["heads"] for r in rows], [r[key] * factor for r in rows], color=MINE[0])
        ax.bar_label(bars, [f"{r[key] * factor:,.1f}" for r in rows], fontsize=8)
        ax.set_ylabel(f"{label}, {longest:,} points")
    return figure


def kernels(result: dict[str, Any]) -> Any:
    """One panel a section, one line a row: the share of the machine's limit that each kernel reaches."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        sections.setdefault(row["section"], []).append(row)
    names = list(dict.fromkeys(name for row in result["rows"] for name, r in row["results"].items() if "us" in r))
    heights = [len(rows) + 1.5 for rows in sections.values()]
    figure, axes = plt.subplots(
        len(sections), 1, figsize=(8, 0.24 * sum(heights) + 1), height_ratios=heights, squeeze=False
    )
    for ax, (section, rows) in zip(axes.flat, sections.items(), strict=True):
        for i, name in enumerate(names):
            found = [(y, row) for y, row in enumerate(rows) if "us" in row["results"].get(name, {})]
            limits = [result["limits"]["copy_bytes" if r["unit"] == "byte" else "matmul_flops"] for _, r in found]
            shares = [
                r["work"] / r["results"][name]["us"] * 1e6 / limit for (_, r), limit in zip(found, limits, strict=True)
            ]
            style = {"color": MINE[1], "zorder": 3} if name == "ours" else {"color": f"C{i - 1}", "alpha": 0.75}
            ax.scatter(shares, [y for y, _ in found], s=42 if name == "ours" else 22, label=name, **style)
        ax.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
        ax.set_title(section, fontsize=9, loc="left")
        ax.set_xlim(0, max(1.1, ax.get_xlim()[1]))
        ax.axvline(1, linestyle="--", color=GREY, linewidth=0.8)
        ax.grid(axis="y")
        ax.tick_params(axis="x", labelsize=7)
        ax.invert_yaxis()
    axes[0, 0].legend(fontsize=7)
    figure.suptitle("Kernels: share of what memory or arithmetic allows (dashed)", fontsize=11)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON of models.py, claims.py or kernels.py")
    suit_both_grounds()
    for path in parser.parse_args(argv).results:
        result = json.loads(path.read_text())
        draw = claims if "rows" not in result else kernels if "results" in result["rows"][0] else models
        figure = draw(result)
        figure.text(0.01, 0.004, caption(result), fontsize=6)
        figure.tight_layout(rect=(0, 0.02, 1, 1))
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        plt.close(figure)
        print(path.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
