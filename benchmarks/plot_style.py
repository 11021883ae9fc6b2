"""Figures that read on a white page and on a dark one: no ground of their own, and greys from the middle."""

from __future__ import annotations

#: on white 4.0 : 1, on GitHub's dark ground 4.7 : 1, on the site's 4.0 : 1
GREY = "#7a828b"
_INKS = (
    "text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color",
    "legend.labelcolor", "legend.edgecolor",
)  # fmt: skip


def suit_both_grounds() -> None:
    """Let all figures that matplotlib draws from here on suit both."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(dict.fromkeys(_INKS, GREY))
    matplotlib.rcParams.update({"savefig.transparent": True, "legend.framealpha": 0.0, "grid.alpha": 0.3})
