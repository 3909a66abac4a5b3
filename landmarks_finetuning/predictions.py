"""Where a detector sees the landmarks of a set of images, as files: a table, markups for 3D Slicer, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from core.data.dataset import ImageSet
from core.files import atomic_file
from core.formats.geometry import index_to_world
from core.formats.markups import write_markups
from landmarks_finetuning.heatmaps import contour_centroid
from landmarks_finetuning.inference import TrainedDetector, locate
from landmarks_finetuning.paper_scorer import round_original
from landmarks_finetuning.refinement import refine


@dataclass(frozen=True, eq=False)
class Predictions:
    """points (M, N, D) in stored pixels and confidence (M, N), NaN = none, of the landmarks `names` in `images`.

    `scorer_points` (M, N, 2) are network pixels for the paper's scorer, None for volumes. `detector` draws heatmaps
    for pictures; the guess without an image has none.
    """

    images: ImageSet
    names: Sequence[str]
    points: np.ndarray
    confidence: np.ndarray
    scorer_points: np.ndarray | None = None
    detector: TrainedDetector | None = None


def find_landmarks(detector: TrainedDetector, images: ImageSet, decoder: str | None = None, refined: bool = True
                   ) -> Predictions:
    """Run `detector` on `images`, its second stage too where it has one, unless `refined` is false.

    Heatmaps are decoded batch by batch and not kept.
    """
    points, confidence, scorer_points = [], [], []
    flat = images.images.ndim == 4
    for _, outputs, maps in detector.heatmaps(images):
        predicted, sure = locate(outputs, maps, detector.config.finetune, detector.sigma, decoder, detector.shape)
        points.append(predicted)
        confidence.append(sure)
        if flat:
            scorer_points.append(contour_centroid(outputs).numpy())
    answers = np.concatenate(points), np.concatenate(confidence), np.concatenate(scorer_points) if flat else None
    if refined and detector.second is not None:
        answers = _refined(detector, detector.second, images, answers[0])
    return Predictions(images, detector.landmark_names, *answers, detector)


def _refined(detector: TrainedDetector, second: TrainedDetector, images: ImageSet, answers: np.ndarray
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Points, confidences and the scorer's points of the second stage about the first one's `answers`."""
    points, confidence = refine(second.model, images.records, answers, second.header["spread_pixels"], detector.config)
    side = detector.config.dataset.image_size
    square = len(side) == 2 and len(set(side)) == 1  # of others there is no published scorer
    return points, confidence, round_original(points, images.original_sizes, side[0]) if square else None


def table_rows(predictions: Predictions, errors: np.ndarray | None = None,
               published: np.ndarray | None = None, human: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Rows of predictions.csv: one per image and landmark, (x, y[, z]) in stored pixels; NaN = no value.

    `errors` (M, N) adds truth and error columns; `published` (M, N) are the paper's scorer's, `human` (M, N) the
    distances between two annotators.
    """
    axes = "xyz"[: predictions.points.shape[2]]
    rows = []
    for m, record in enumerate(predictions.images.records):
        for n, name in enumerate(predictions.names):
            row = {"image": record.id, "patient": record.patient, "landmark": name}
            row |= dict(zip(axes, predictions.points[m, n, ::-1], strict=True))
            if errors is not None:
                row |= {f"truth_{a}": v for a, v in zip(axes, record.truth[n, ::-1], strict=True)}
                row |= {"error": errors[m, n], "paper_error": None if published is None else published[m, n]}
                row |= {} if human is None else {"human_distance": human[m, n]}
            rows.append({**row, "confidence": predictions.confidence[m, n]})
    return rows


def append_rows(table: BinaryIO, rows: list[dict[str, Any]]) -> None:
    """Write `rows` to the end of a CSV with empty cells for NaN, below a header where nothing is there yet."""
    text = pd.DataFrame(rows).to_csv(index=False, header=table.tell() == 0, float_format="%.4f")
    table.write(text.encode())


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows` as a CSV, atomically."""
    with atomic_file(path) as table:
        append_rows(table, rows)


def write_slicer_files(folder: Path, predictions: Predictions) -> None:
    """folder/<image>.mrk.json (LPS mm) for every volume that says where its voxels lie; opens in 3D Slicer on it."""
    for record, points, sure in zip(predictions.images.records, predictions.points, predictions.confidence,
                                    strict=True):
        if record.geometry is not None and record.geometry.affine is not None:
            descriptions = ["" if np.isnan(value) else f"confidence {value:.3f}" for value in sure]
            write_markups(folder / f"{record.id}.mrk.json", predictions.names,
                          index_to_world(points, record.geometry.affine), descriptions)








