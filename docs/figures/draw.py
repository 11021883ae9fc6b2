"""Draw the pictures of docs/how-it-works.md: `python docs/figures/draw.py [FOLDER]`. The SVG files are committed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from hf_attn_patch import KVGrouping

GROUPS = ("#3f51b5", "#e08214", "#1b9e77", "#c2185b", "#7570b3", "#66a61e", "#a6761d", "#666666")
GREY = "#808080"  # reads on white and on black


def grouping(ax: Any) -> None:
    """Eight query heads with 8, 2 and 1 KV heads."""
    for column, kv_heads in enumerate((8, 2, 1)):
        groups = KVGrouping(8, kv_heads)
        left = column * 9.6
        for h in range(8):
            kv = groups.kv_head(h)
            color = GROUPS[kv if kv_heads < 8 else h]
            middle = left + sum(groups.query_heads(kv)) / groups.group_size
            ax.plot([left + h, middle], [1.2, 2.3], color=color, lw=1.2, zorder=1)
            ax.add_patch(plt.Rectangle((left + h - 0.32, 0.4), 0.64, 0.8, color=color, alpha=0.55, lw=0))
            ax.add_patch(plt.Rectangle((middle - 0.32, 2.3), 0.64, 0.8, color=color, lw=0))
        title = {8: "MHA: 8 KV heads", 2: "GQA: 2 KV heads", 1: "MQA: 1 KV head"}[kv_heads]
        share = "the whole cache" if kv_heads == 8 else f"1/{groups.group_size} of the cache"
        ax.text(left + 3.5, 3.65, title, ha="center", color=GREY, weight="bold")
        ax.text(left + 3.5, -0.15, share, ha="center", color=GREY)
    ax.text(-1.0, 0.8, "queries", ha="right", va="center", color=GREY)
    ax.text(-1.0, 2.7, "K, V", ha="right", va="center", color=GREY)
    ax.set(xlim=(-3.6, 27.4), ylim=(-0.5, 4.2))


def pooling(ax: Any) -> None:
    """Norm of the mean of G orthogonal heads of norm 1, worked out with random heads of 128 x 1024."""
    rng = np.random.default_rng(0)
    sizes = [1, 2, 4, 8, 16, 32]
    heads = rng.standard_normal((32, 128 * 1024)).astype(np.float32)
    heads /= np.linalg.norm(heads, axis=1, keepdims=True)
    measured = [float(np.linalg.norm(heads[:g].mean(0))) for g in sizes]
    ax.plot(sizes, [1 / math.sqrt(g) for g in sizes], color=GREY, lw=1, ls="--", label="1 / sqrt(G)")
    ax.plot(sizes, measured, "o", color=GROUPS[0], label="mean of G random heads")
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(g) for g in sizes])
    ax.set(xlabel="heads merged into one (G)", ylabel="norm of the mean, heads have 1", ylim=(0, 1.08))
    ax.legend(frameon=False, labelcolor=GREY)
    frame(ax)


def alignment(ax: Any) -> None:
    """The same two directions in two bases: their mean, and the shared head after turning one of them."""
    head = np.array([[1.0, 0.35], [-0.25, 0.9]])
    angle = math.radians(125)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    other = turn @ head
    for panel, (title, second) in enumerate((("as they stand", other), ("turned into one basis", turn.T @ other))):
        left = 3.4 * panel
        mean = (head + second) / 2
        for rows, color, width in ((head, GROUPS[0], 4.0), (second, GROUPS[1], 1.6), (mean, GROUPS[2], 2.4)):
            style = "--" if rows is mean else "-"
            for x, y in rows:
                ax.plot([left, left + x], [0, y], color=color, lw=width, ls=style, solid_capstyle="round")
                ax.plot([left + x], [y], "o", color=color, ms=4)
        ax.text(left, 1.35, title, ha="center", color=GREY, weight="bold")
        share = np.linalg.norm(mean) / np.linalg.norm(head)
        ax.text(left, -1.45, f"the mean keeps {share:.0%} of the norm", ha="center", color=GREY)
    for x, color, text in ((5.3, GROUPS[0], "head 1"), (5.3, GROUPS[1], "head 2"), (5.3, GROUPS[2], "their mean")):
        y = {"head 1": 0.5, "head 2": 0.1, "their mean": -0.3}[text]
        ax.text(x, y, text, color=color, va="center")
    ax.set(xlim=(-1.8, 6.6), ylim=(-1.7, 1.7), aspect="equal")


def frame(ax: Any) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(colors=GREY)
    ax.xaxis.label.set_color(GREY)
    ax.yaxis.label.set_color(GREY)


FIGURES: dict[str, tuple[Callable[[Any], None], tuple[float, float], bool]] = {
    "grouping": (grouping, (9.0, 2.1), False),
    "pooling": (pooling, (5.6, 2.8), True),
    "alignment": (alignment, (7.2, 3.0), False),
}


def main(folder: Path) -> None:
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "hf-attn-patch", "font.family": "sans-serif"})
    for name, (draw, size, axes) in FIGURES.items():
        figure, ax = plt.subplots(figsize=size, layout="constrained")
        draw(ax)
        if not axes:
            ax.set_axis_off()
        figure.savefig(folder / f"{name}.svg", transparent=True, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
