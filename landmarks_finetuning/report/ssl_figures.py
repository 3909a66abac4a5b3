"""Curves of the self-supervised encoders' pre-training: losses, and whether the embeddings still say anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from core.training.run_log import read_metrics
from landmarks_finetuning.report.figures import colour, new_figure, shared_legend, styled
from landmarks_finetuning.report.findings import display_name

PANELS = {  # of metrics.jsonl's keys: {key: line style} and the panel's title
    "Loss (dashed: validation)": {"loss": "-", "validation_loss": "--"},
    "Spread of the embeddings (0: all alike)": {"embedding_spread": "-"},
    "Effective rank of the embeddings": {"effective_rank": "-"},
    "DINO’s teacher: entropy, dashed: information": {"teacher_entropy": "-", "teacher_information": "--"},
}


def read_ssl(experiment: Path) -> dict[str, list[dict[str, Any]]]:
    """{method, or method_preset: the lines of its metrics.jsonl} of runs/<experiment>/ssl/*; without empty ones."""
    logs = {path.parent.name: read_metrics(path) for path in sorted(experiment.glob("ssl/*/metrics.jsonl"))}
    return {name: lines for name, lines in logs.items() if lines}


@styled
def ssl_curves(methods: dict[str, list[dict[str, Any]]]) -> Figure | None:
    """A panel for each of PANELS that has values, a line for each method; None where there are none."""
    panels = {title: styles for title, styles in PANELS.items()
              if any(key in line for key in styles for lines in methods.values() for line in lines)}
    if not panels:
        return None
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    figure, axes = new_figure(4.6 * columns, 2.8 * rows + 0.3, rows, columns, sharex=True)
    for axis, (title, styles) in zip(axes.flat, panels.items(), strict=False):
        for name, lines in methods.items():
            for key, style in styles.items():
                _draw(axis, name, [(line["step"], line[key]) for line in lines if line.get(key) is not None], style)
        axis.set_title(title, loc="left")
        axis.set_xlabel("optimiser steps")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.tick_params(labelbottom=True)
        axis.set_xlim(left=0)
        axis.set_ylim(0, 1.05 * max(axis.get_ylim()[1], 1e-9))
    for axis in list(axes.flat)[len(panels):]:
        axis.set_visible(False)
    shared_legend(figure, axes)
    return figure


def _draw(axis: Axes, name: str, points: list[tuple[int, float]], style: str) -> None:
    """One line; only solid ones are named, and one point alone is a mark."""
    if not points:
        return
    method, _, preset = name.partition("_")
    label = f"{display_name(method)} ({preset})" if preset else display_name(method)
    axis.plot(*np.array(points, dtype=float).T, style, color=colour(method), linewidth=1.6,
              alpha=0.6 if preset else 1.0, marker="o" if len(points) < 12 else None, markersize=3.5,
              label=label if style == "-" else None)
