"""Figures of the paper's kind: error by method and number of labels, validation error by pre-training iteration."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from landmarks_finetuning.report.figures import INK, colour, new_figure, shared_legend, styled
from landmarks_finetuning.report.findings import STUDIED, UNTRAINED, display_name, shots_text
from landmarks_finetuning.report.frames import grouped
from landmarks_finetuning.report.order import best_first


@styled
def error_bars(summary: pd.DataFrame, unit: str) -> Figure | None:
    """Mean radial error by number of labels and trained method (main variants) with 95 % intervals over patients."""
    variants = best_first(summary.loc[summary["backbone"] != UNTRAINED])
    shots, count = sorted(summary["shots"].unique()), len(variants)
    if not variants:
        return None
    figure, axes = new_figure(max(5.0, 1.2 + len(shots) * (0.34 * count + 0.5)), 3.4)
    axis, width = axes[0, 0], 0.84 / count
    for index, (backbone, variant) in enumerate(variants.items()):
        rows = summary[(summary["backbone"] == backbone) & (summary["variant"] == variant)].set_index("shots")
        places = [shots.index(s) + (index - (count - 1) / 2) * width for s in rows.index]
        limits = np.stack([rows["mre"] - rows["interval_low"], rows["interval_high"] - rows["mre"]]).clip(min=0)
        axis.bar(places, rows["mre"], width * 0.92, yerr=np.nan_to_num(limits), capsize=2.5, ecolor=INK,
                 error_kw={"elinewidth": 1.0}, color=colour(backbone, list(variants)), label=display_name(backbone))
    axis.set_xticks(range(len(shots)), [shots_text(s) for s in shots])
    axis.grid(visible=False, axis="x")
    axis.set_ylim(bottom=0)
    axis.set_ylabel(f"mean radial error ({unit})")
    shared_legend(figure, axes)
    return figure


@styled
def error_against_iterations(means: pd.DataFrame, unit: str) -> Figure | None:
    """The paper's figure 2: validation error against the pre-training iteration, a line per number of labels.

    `means` are the rows of one family of `iteration_means`, with petaflop; where all of that is known a second panel
    has the total training compute as its axis. A ring marks the chosen iteration. None for no rows.
    """
    if means.empty:
        return None
    axes_of = [("iteration", "pre-training iterations (0: from scratch)")]
    if means["petaflop"].notna().all():
        axes_of.append(("petaflop", "training compute (petaFLOP), fine-tuning included"))
    figure, axes = new_figure(4.6 * len(axes_of) + 1.0, 3.8, 1, len(axes_of), sharey=True)
    shots = sorted(means["shots"].unique())
    for axis, (column, title) in zip(axes[0], axes_of, strict=True):
        for index, (count, group) in enumerate(grouped(means, "shots")):
            group, shade = group.sort_values(column), 0.35 + 0.65 * (index + 1) / len(shots)
            axis.plot(group[column], group["validation_mre"], color=colour(STUDIED), marker="os^Dv"[index % 5],
                      alpha=shade, linewidth=1.8, label=shots_text(count))
            best = group[group["chosen"]]
            axis.plot(best[column], best["validation_mre"], "o", markersize=11, markerfacecolor="none",
                      markeredgecolor=INK, label="chosen" if index == len(shots) - 1 else "_")
        axis.set_xlabel(title)
        axis.set_ylim(bottom=0)
    axes[0, 0].set_ylabel(f"validation error ({unit})")
    shared_legend(figure, axes)
    return figure
