"""Expected against seen errors, and the ROC of large errors: a column per number of labels, a line per method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from landmarks_finetuning.report.confidence import Confidence
from landmarks_finetuning.report.figures import INK, colour, new_figure, shared_legend, styled
from landmarks_finetuning.report.findings import display_name, shots_text

ROC_GRID = 200  # cells along each side of its panel, which is 2.9 inches wide


@styled
def confidence_figure(found: Sequence[Confidence], unit: str) -> Figure | None:
    """Above the reliability, where the dotted diagonal is an expectation that comes true; below the ROC, if any."""
    if not found:
        return None
    shots = sorted({each.row["shots"] for each in found})
    backbones = sorted({each.row["backbone"] for each in found})
    rows = 1 + any(each.roc is not None for each in found)
    figure, axes = new_figure(2.9 * len(shots) + 1.4, 2.9 * rows + 0.5, rows, len(shots), sharey="row")
    for column, count in enumerate(shots):
        here = [each for each in found if each.row["shots"] == count]
        top = 1.05 * max(float(each.bins.max()) for each in here) or 1.0
        for axis, reach, title in zip(axes[:, column], (top, 1), (f"expected error ({unit})", "false alarms"),
                                      strict=False):
            axis.plot([0, reach], [0, reach], color=INK, linewidth=0.9, linestyle=":")
            axis.set_xlim(0, reach)
            axis.set_xlabel(title)
        for each in here:
            look = {"color": colour(each.row["backbone"], backbones), "linewidth": 1.8,
                    "label": display_name(each.row["backbone"])}
            axes[0, column].plot(*each.bins.T, marker="o", markersize=4, **look)
            if each.roc is not None:
                axes[1, column].plot(*_drawn(*each.roc), **look)
        axes[0, column].set_title(shots_text(count), loc="left")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel(f"mean error seen ({unit})")
    if rows > 1:
        axes[1, 0].set_ylim(0, 1)
        axes[1, 0].set_ylabel(f"errors above {found[0].row['threshold']:g} {unit} found")
    shared_legend(figure, axes)
    return figure


def _drawn(false: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points of a ROC that can be told apart: its ends, and the first in each cell of ROC_GRID x ROC_GRID.

    A curve has a point for each landmark of each image and draw: a page of six panels would have megabytes of them.
    """
    cells = np.round(np.stack([false, true], axis=1) * ROC_GRID)
    kept = np.r_[True, (np.diff(cells, axis=0) != 0).any(axis=1)]
    kept[-1] = True
    return false[kept], true[kept]
