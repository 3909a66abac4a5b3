"""Figures of the paper's kind: error by method and number of labels, validation error by pre-training iteration."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from landmarks_finetuning.report.collect import main_variants
from landmarks_finetuning.report.figures import INK, colour, new_figure, shared_legend, styled
from landmarks_finetuning.report.findings import STUDIED, UNTRAINED, display_name, shots_text
from landmarks_finetuning.report.order import best_first

ITERATION = re.compile(r"(^|_)iter-\d+")  # of a variant's slug


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


def iteration_means(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean validation error by number of labels and pre-training iteration, 0 being the run from scratch.

    Columns shots, iteration, validation_mre (mean over draws and seeds of the error logged at the kept step), runs. The
    diffusion model's variants that differ in the iteration alone make one family; the one with most iterations is
    shown, beside the main from-scratch variant. Empty where fewer than two iterations were fine-tuned.
    """
    known = runs[runs["pretraining_iteration"].notna() & runs["validation_mre"].notna()]
    families = known["variant"].map(lambda variant: ITERATION.sub("", variant).strip("_") or "default")
    studied = known["backbone"] == STUDIED
    counts = known[studied].groupby(families[studied])["pretraining_iteration"].nunique()
    if counts.empty or counts.max() < 2:
        return pd.DataFrame()
    scratch = (known["backbone"] == "scratch") & (known["variant"] == main_variants(runs).get("scratch"))
    chosen = known[(studied & (families == counts.idxmax())) | scratch]
    chosen = chosen.assign(iteration=chosen["pretraining_iteration"].astype(int),
                           validation_mre=chosen["validation_mre"].astype(float))
    grouped = chosen.groupby(["shots", "iteration"])["validation_mre"]
    return grouped.agg(validation_mre="mean", runs="size").reset_index()


@styled
def error_against_iterations(runs: pd.DataFrame, unit: str) -> Figure | None:
    """The paper's figure 2: validation error against the pre-training iteration, a line per number of labels."""
    means = iteration_means(runs)
    if means.empty:
        return None
    figure, axes = new_figure(6.4, 3.6)
    axis, shots = axes[0, 0], sorted(means["shots"].unique())
    for index, (count, group) in enumerate(means.groupby("shots")):
        axis.plot(group["iteration"], group["validation_mre"], color=colour(STUDIED), marker="os^Dv"[index % 5],
                  alpha=0.35 + 0.65 * (index + 1) / len(shots), linewidth=1.8, label=shots_text(count))
    axis.set_xlabel("pre-training iterations (0: from scratch)")
    axis.set_ylabel(f"validation error ({unit})")
    axis.set_ylim(bottom=0)
    shared_legend(figure, axes)
    return figure
