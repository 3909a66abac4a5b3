"""What each method sees on the same test images, as the paper's figure 3: heatmaps over the image, points, truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from landmarks_finetuning.pictures.heatmap_files import FILE, read_heatmaps
from landmarks_finetuning.pictures.overlays import PAPER, as_image, draw_marks, map_points, shaded, stacked, title_strip
from landmarks_finetuning.report.collect import select
from landmarks_finetuning.report.findings import display_name, shots_text
from landmarks_finetuning.report.order import best_first
from landmarks_finetuning.report.run_files import error_matrix

PAPER_LABELS = 10  # of the paper's figure
HEAT = (235, 45, 105)  # unlike the marks' colours
OPACITY = 0.85
MARK_SCALE = 0.7
ENLARGED = 2  # the picture, so that the marks hide less of it
GAP = 8  # between the pictures of a row, in pixels


def draw_heat(picture: np.ndarray, heat: np.ndarray, predictions: np.ndarray | None, truth: np.ndarray) -> Image.Image:
    """`picture` (h, w), ENLARGED times, with `heat` (k, l), both uint8 and of one field, over it and the points' marks.

    `predictions` (crosses; None: none) and `truth` (rings) are (N, 2) pixels of `picture`.
    """
    shape = (picture.shape[0] * ENLARGED, picture.shape[1] * ENLARGED)
    canvas = shaded(picture[None], shape, window=(0, 255))
    strength = Image.fromarray(heat).resize(shape[::-1], Image.Resampling.BILINEAR)  # keeps edges on edges
    alpha = np.asarray(strength, dtype=np.float64)[..., None] / 255 * OPACITY
    canvas += alpha * (np.array(HEAT) - canvas)
    points = np.full_like(truth, np.nan) if predictions is None else predictions
    for point, target in zip(*(map_points(p, picture.shape, shape) for p in (points, truth)), strict=True):
        draw_marks(canvas, point, target, scale=MARK_SCALE)
    return as_image(canvas)


def heatmap_rows(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """One row for the truth and for each method (main variants, best first): the same test images side by side.

    Keys: backbone and variant (None: the truth), name, shots, draw, errors [(image, mean error)] and picture. Of the
    numbers of labels that most methods have files for, the one nearest to the paper's; the first draw's first seed.
    Empty where no run has a file.
    """
    stored = runs[runs["path"].map(lambda path: (path / FILE).is_file())]
    drawn = [select(stored, backbone, variant, shots).sort_values(["draw", "seed"]).iloc[0]
             for shots in _labels(stored) for backbone, variant in best_first(runs).items()
             if not select(stored, backbone, variant, shots).empty]
    cases = [read_heatmaps(run["path"] / FILE) for run in drawn]
    images = [image for image in (cases[0] if cases else ()) if all(image in case for case in cases)]
    if not images:
        return []
    first, shots = [cases[0][image] for image in images], int(drawn[0]["shots"])
    rows = [{"backbone": None, "variant": None, "name": "Truth", "shots": shots, "draw": None,
             "errors": [(image, None) for image in images],
             "picture": _side_by_side([draw_heat(c.picture, c.target, None, c.truth) for c in first])}]
    for run, case in zip(drawn, cases, strict=True):
        errors = error_matrix(run["path"])[0].mean(axis=1)
        shown = [case[image] for image in images]
        rows.append({"backbone": run["backbone"], "variant": run["variant"], "name": display_name(run["backbone"]),
                     "shots": shots, "draw": int(run["draw"]),
                     "errors": [(image, errors.get(image)) for image in images],
                     "picture": _side_by_side([draw_heat(c.picture, c.heat, c.found, c.truth) for c in shown])})
    return rows


def _labels(stored: pd.DataFrame) -> list[int]:
    """The number of labels to show, none where nothing is stored."""
    counts = stored.groupby("shots")["backbone"].nunique()
    most = counts.index[counts == counts.max()]
    return [int(min(most, key=lambda shots: (abs(shots - PAPER_LABELS), shots)))] if len(most) else []


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    row, column = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER), 0
    for picture in pictures:
        row.paste(picture, (column, 0))
        column += picture.width + GAP
    return row


def whole_figure(rows: Sequence[dict[str, Any]]) -> Image.Image:
    """The rows of `heatmap_rows` below each other, each under its name: the figure for a paper."""
    strips = []
    for row in rows:
        name = row["name"] if row["backbone"] is None else f"{row['name']}, {shots_text(row['shots'])}"
        strips += [title_strip(name, row["picture"].width), row["picture"]]
    return stacked(strips)
