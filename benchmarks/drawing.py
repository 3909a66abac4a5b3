"""The picture of a benchmark."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def draw(path: Path, title: str, unit: str, values: dict[str, float]) -> None:
    """Horizontal bars."""
    figure, axes = plt.subplots(figsize=(8, 1 + 0.35 * len(values)), layout="constrained")
    shown = axes.barh(list(values), list(values.values()),
                      color=["tab:blue" if name.startswith("ours") else "tab:grey" for name in values])
    axes.bar_label(shown, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel=unit, title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
