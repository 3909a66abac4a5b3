"""Figures of the report: one colour per backbone everywhere, inline SVG for the page and PNG files for talks."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from core.training.run_log import read_metrics
from landmarks_finetuning.report.collect import errors_by_draw, human_distances, select
from landmarks_finetuning.report.findings import HUMAN, UNTRAINED, display_name, shots_text
from landmarks_finetuning.report.frames import grouped, named_rows
from landmarks_finetuning.report.order import best_first

P = ParamSpec("P")
R = TypeVar("R")
LEGEND_COLUMN = 2.1  # inches: the longest name at 9 points and its line
COLOURS = {"ddpm": "#0072B2", "scratch": "#D55E00", "mean_shape": "#808080", "imagenet": "#009E73",
           "mocov3": "#CC79A7", "simclrv2": "#E69F00", "dino": "#56B4E9",  # Okabe and Ito
           "random": "#8A6FD1", "gu2net": "#9C5A3C", "global_to_local": "#5B8C85"}
SPARE_COLOURS = ("#B0A100", "#C2456B", "#3F6C9C", "#7A7A2E")
QUARTILE_COLOURS = ("#56B4E9", "#009E73", "#E69F00", "#CC79A7")
WIDE_POINTS = 600  # a figure as wide as this has too small a text where its place is narrow
CURVE_POINTS, FEWEST_POINTS = 15_000, 40  # of all lines of a panel's measure together, and of each at least
INK = "#1b2027"  # replaced by the page's text colour in the SVG
STYLE: dict[Any, Any] = {  # matplotlib's own type lists every key
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True,
    "grid.color": INK, "grid.alpha": 0.13, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.family": ["DejaVu Sans"], "axes.titlesize": 10.5,
    "axes.titleweight": "bold", "text.parse_math": False,  # a landmark may be called $x^{$
}


def colour(backbone: str, backbones: Sequence[str] = ()) -> str:
    """A backbone's colour; unknown ones get spare colours in the order of their names."""
    if backbone in COLOURS:
        return COLOURS[backbone]
    unknown = sorted(b for b in {*backbones, backbone} if b not in COLOURS)
    return SPARE_COLOURS[unknown.index(backbone) % len(SPARE_COLOURS)]


def save_figure(figure: Figure, path: Path) -> str:
    """Write `path` (.png) on white and return the figure as inline SVG that takes the page's text colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=160, facecolor="white")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.S)
    text = re.sub(r'\sid="(figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend)_[^"]*"', "", text)
    text = re.sub(r'\sd="[^"]*"', _shorter, text)
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans'", "inherit")
    return re.sub(r"<svg [^>]*>", _without_size, text, count=1)


def _shorter(path: re.Match) -> str:
    """The same ` d="..."` to a hundredth of a point, without line breaks."""
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number.group()):.2f}", " " + " ".join(path.group().split()))


def thinned(points: np.ndarray, most: int) -> np.ndarray:
    """(K, 2) -> at most `most` of the points, the first and the last among them, evenly by number."""
    return points[np.unique(np.linspace(0, len(points) - 1, min(most, len(points))).round().astype(int))]


def _without_size(tag: re.Match) -> str:
    """The <svg> tag as wide as its place, but not so wide that one figure's text outgrows another's.

    A wide one says the least width at which it can be read: in a narrow window it scrolls.
    """
    points = float(re.findall(r'width="([\d.]+)pt"', tag.group())[0])
    least = f";--least:{points * 0.75:.0f}px" if points > WIDE_POINTS else ""
    bare = re.sub(r'\s(width|height)="[^"]*"', "", tag.group())[:-1]
    return f'{bare} style="max-width:{points * 1.5:.0f}px{least}">'


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1,
               **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of `width` x `height` inches in the report's style and its (rows, columns) axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function under the report's style."""
    @wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> R:
        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **options)
    return drawn


def _line_style(backbone: str) -> str | tuple[int, tuple[int, int]]:
    return (0, (4, 3)) if backbone == UNTRAINED else "-"


@styled
def error_against_shots(summary: pd.DataFrame, unit: str) -> Figure:
    """Mean radial error against the number of labels, one line per method, bars: standard deviation over draws.

    With one draw the bars are the 95 % interval over patients.
    """
    figure, axes = new_figure(7.2, 4.4)
    axis, backbones = axes[0, 0], sorted(summary["backbone"].unique())
    several = summary.groupby("backbone")["variant"].nunique()
    order = list(best_first(summary))
    methods = sorted(grouped(summary, ["backbone", "variant"]), key=lambda item: order.index(item[0][0]))
    for index, ((backbone, variant), group) in enumerate(methods):
        group = group.sort_values("shots")
        single = np.stack([group["mre"] - group["interval_low"], group["interval_high"] - group["mre"]])
        bars = np.where(group["mre_spread"].isna(), np.nan_to_num(single), group["mre_spread"]).clip(min=0)
        shift = 1.012 ** (index - (len(methods) - 1) / 2)  # bars of equal x stay apart
        rank = sorted(summary[summary["backbone"] == backbone]["variant"].unique()).index(variant)
        label = display_name(backbone) + (f" · {variant}" if several[backbone] > 1 else "")
        axis.errorbar(group["shots"] * shift, group["mre"], bars, color=colour(backbone, backbones), linewidth=1.8,
                      marker="os^Dv"[rank % 5], markersize=5, elinewidth=1.1, capsize=3,
                      linestyle=_line_style(backbone), label=label)
    shots = sorted(summary["shots"].unique())
    axis.set_xscale("log")
    axis.set_xticks(shots, [str(s) for s in shots])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(shots[0] / 1.25, shots[-1] * 1.25)
    if summary["mre"].max() > 6 * summary["mre"].min():
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if f"{v:.0e}"[0] in "235" else ""))
    else:
        axis.set_ylim(bottom=0)
    axis.set_xlabel("labelled training images")
    axis.set_ylabel(f"mean radial error ({unit})")
    shared_legend(figure, axes)
    return figure


@dataclass(frozen=True)
class WithinCurves:
    """Percent of landmarks within every distance: of each number of shots {backbone: (P,)}, and of the annotators."""

    distances: np.ndarray  # (P,), from 0, with all thresholds among them, in the data set's unit
    thresholds: Sequence[float]
    panels: dict[int, dict[str, np.ndarray]]
    human: np.ndarray | None  # (P,)


def within_curves(runs: pd.DataFrame, thresholds: Sequence[float], points: int = 160) -> WithinCurves:
    """The curves of all main variants, all draws pooled, up to 2.5 times the largest of `thresholds`."""
    reach = 2.5 * max(thresholds, default=runs["p95"].median() / 2)
    distances = np.union1d(np.linspace(0, reach, points).round(6), np.asarray(thresholds, dtype=float))
    human = human_distances(runs)
    panels: dict[int, dict[str, np.ndarray]] = {}
    for shots in sorted(runs["shots"].unique()):
        for backbone, variant in best_first(runs).items():
            group = select(runs, backbone, variant, shots)
            if not group.empty:
                errors = np.concatenate([e.ravel() for e in errors_by_draw(group)[0].values()])
                curve = _percent_within(np.sort(errors[~np.isnan(errors)]), distances)
                panels.setdefault(int(shots), {})[backbone] = curve
    return WithinCurves(distances, thresholds, panels, _percent_within(human, distances) if len(human) else None)


def page_curves(curves: WithinCurves, unit: str) -> dict[str, Any]:
    """What the page's script draws of `curves`: plain numbers, a list of panels by number of labels."""
    backbones = sorted({backbone for panel in curves.panels.values() for backbone in panel})

    def entry(key: str, name: str, shade: str, values: np.ndarray, **look: bool) -> dict[str, Any]:
        return {"key": key, "name": name, "colour": shade, "values": np.round(values, 2).tolist(), **look}

    panels = [{"labels": str(shots),
               "curves": [entry(backbone, display_name(backbone), colour(backbone, backbones), values,
                                dashed=backbone == UNTRAINED) for backbone, values in panel.items()]}
              for shots, panel in curves.panels.items()]
    reference = [] if curves.human is None else [entry("human", HUMAN, "currentColor", curves.human, thin=True)]
    return {"unit": unit, "distances": curves.distances.tolist(), "panels": panels,
            "thresholds": list(curves.thresholds), "reference": reference}


@styled
def cumulative_errors(curves: WithinCurves, unit: str) -> Figure:
    """Percent of landmarks within every distance, one panel per number of shots.

    A thin line shows the distances between two annotators where they are known.
    """
    columns = 2 if len(curves.panels) == 4 else min(3, len(curves.panels))
    rows = -(-len(curves.panels) // columns)
    figure, axes = new_figure(3.3 * columns + 0.8, 2.9 * rows + 0.5, rows, columns, sharey=True)
    backbones = sorted({backbone for panel in curves.panels.values() for backbone in panel})
    for axis, (shots, panel) in zip(axes.flat, curves.panels.items(), strict=False):
        for backbone, values in panel.items():
            axis.plot(curves.distances, values, linewidth=1.8, color=colour(backbone, backbones),
                      linestyle=_line_style(backbone), label=display_name(backbone))
        if curves.human is not None:
            axis.plot(curves.distances, curves.human, linewidth=0.9, color=INK, label=HUMAN)
        for threshold in curves.thresholds:
            axis.axvline(threshold, color=INK, linewidth=0.7, alpha=0.45, linestyle=":")
        axis.set_title(shots_text(shots), loc="left")
        axis.set_xlim(0, curves.distances[-1])
        axis.set_ylim(0, 100)
        axis.set_xlabel(f"distance ({unit})")
    for axis in axes[:, 0]:
        axis.set_ylabel("landmarks within (%)")
    for axis in list(axes.flat)[len(curves.panels):]:
        axis.set_visible(False)
    shared_legend(figure, axes)
    return figure


def _percent_within(sorted_distances: np.ndarray, grid: np.ndarray) -> np.ndarray:
    return 100 * np.searchsorted(sorted_distances, grid, side="right") / max(len(sorted_distances), 1)


def shared_legend(figure: Figure, axes: np.ndarray) -> None:
    """One legend above all axes, each label once, in as many columns as the figure is wide."""
    entries: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    if entries:
        column = max(LEGEND_COLUMN, 0.6 + 0.072 * max(map(len, entries)))
        columns = max(1, min(4, len(entries), int(figure.get_figwidth() / column)))
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns, fontsize=9)


@styled
def pretraining_curves(lines: list[dict], num_train_timesteps: int) -> Figure | None:
    """DDPM training loss and validation loss, and the validation loss by quartile of the timestep."""
    training = np.array([(line["step"], line["loss"]) for line in lines if "loss" in line])
    validation = [line for line in lines if "validation_loss" in line]
    if not len(training):
        return None
    figure, axes = new_figure(9.2, 3.4, 1, 2 if validation else 1)
    losses = axes[0, 0]
    losses.plot(*training.T, color=COLOURS["ddpm"], alpha=0.3, linewidth=0.9, label="training, each record")
    losses.plot(training[:, 0], _smoothed(training[:, 1]), color=COLOURS["ddpm"], linewidth=1.8,
              label="training, smoothed")
    if validation:
        steps = [line["step"] for line in validation]
        losses.plot(steps, [line["validation_loss"] for line in validation], color=COLOURS["scratch"], marker="o",
                  markersize=3.5, linewidth=1.6, label="validation")
        for quartile, shade in enumerate(QUARTILE_COLOURS):
            first, last = (num_train_timesteps * (quartile + k) // 4 - k for k in (0, 1))
            values = [line.get(f"validation_loss_q{quartile + 1}", np.nan) for line in validation]
            axes[0, 1].plot(steps, values, color=shade, marker="o", markersize=3.5, linewidth=1.6,
                            label=f"timesteps {first}–{last}")
        axes[0, 1].set_title("Validation loss by noise level", loc="left")
    losses.set_title("Noise-prediction loss", loc="left")
    for axis in axes.flat:
        _loss_axis(axis)
    losses.legend(fontsize=8.5)
    if validation:
        axes[0, 1].legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _loss_axis(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.set_xlabel("optimiser steps")
    plain = FuncFormatter(lambda v, _: f"{v:g}" if f"{v:.0e}"[0] in "125" else "")
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(plain)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a tenth of the record, shorter at the ends."""
    half = max(1, len(values) // 20)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


@styled
def finetuning_curves(runs: pd.DataFrame, unit: str) -> Figure | None:
    """Training and validation loss and validation error, a column per number of shots, a line per draw and seed.

    Lines of many runs have fewer points each (CURVE_POINTS in all of one measure).
    """
    variants, shots = best_first(runs), sorted(runs["shots"].unique())
    curves = [(run, read_metrics(run.path / "metrics.jsonl")) for backbone, variant in variants.items()
              for run in named_rows(runs) if (run.backbone, run.variant) == (backbone, variant)]
    curves = [(run, lines) for run, lines in curves if lines]
    if not curves:
        return None
    measures = [("loss", "training loss"), ("validation_loss", "validation loss"),
                ("validation_mre", f"validation error ({unit})")]
    measures = [m for m in measures if any(m[0] in line for _, lines in curves for line in lines)]
    figure, axes = new_figure(2.6 * len(shots) + 1.6, 2.3 * len(measures) + 0.6, len(measures), len(shots),
                              sharey="row", sharex="col")
    most = max(FEWEST_POINTS, CURVE_POINTS // len(curves))
    for run, lines in curves:
        for axis, (key, _) in zip(axes[:, shots.index(run.shots)], measures, strict=True):
            points = np.array([(line["step"], line[key]) for line in lines if line.get(key) is not None])
            if len(points):
                axis.plot(*thinned(points, most).T, color=colour(run.backbone, list(variants)), linewidth=1.3,
                          alpha=0.8, marker="o" if len(points) == 1 else None, markersize=4,
                          label=display_name(run.backbone))
    for axis in axes.flat:
        _loss_axis(axis)
        axis.set_xlabel("")
    for column, count in enumerate(shots):
        axes[0, column].set_title(shots_text(count), loc="left")
        axes[-1, column].set_xlabel("optimiser steps")
    for row, (_, label) in enumerate(measures):
        axes[row, 0].set_ylabel(label)
    shared_legend(figure, axes)
    return figure


@styled
def landmark_bars(table: pd.DataFrame, unit: str, shots: int) -> Figure:
    """Mean error of each landmark (rows of `table`) by backbone (its columns), the best one's hardest on top."""
    ordered, count = table.sort_values(str(table.mean().idxmin())), table.shape[1]
    figure, axes = new_figure(6.4, 0.9 + len(table) * (0.13 * count + 0.12))
    axis, height = axes[0, 0], 0.82 / count
    for index, backbone in enumerate(table.columns):
        positions = np.arange(len(ordered)) + ((count - 1) / 2 - index) * height
        axis.barh(positions, ordered[backbone], height * 0.92, color=colour(backbone, list(table.columns)),
                  label=display_name(backbone))
    axis.set_yticks(np.arange(len(ordered)), [str(name) for name in ordered.index])
    axis.set_ylim(-0.6, len(ordered) - 0.4)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(f"mean radial error ({unit}), {shots_text(shots)}")
    shared_legend(figure, axes)
    return figure
